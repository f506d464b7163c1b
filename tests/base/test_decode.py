"""Pictures are decoded one at a time, and in tiles where the GPU has too little memory left for a whole one."""

import pytest
import torch
from diffusers import AutoencoderKL

from dreambooth_moslora.base import decode
from dreambooth_moslora.base import machine as gpu_memory

GIB = 2**30


class RecordingVae(AutoencoderKL):
    """Eight pixels a latent, as SDXL's; notes the shape of each decoded tensor."""

    def __init__(self):
        super().__init__(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            latent_channels=4,
            norm_num_groups=2,
            sample_size=1024,
        )
        self.shapes: list[tuple[int, int, int]] = []
        self.decoder.register_forward_pre_hook(self._note)

    def _note(self, _decoder: object, inputs: tuple[torch.Tensor, ...]) -> None:
        count, _, height, width = inputs[0].shape
        self.shapes.append((count, height, width))


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return RecordingVae().eval()


def free(monkeypatch, gib: float | None) -> None:
    monkeypatch.setattr(decode, "free_gib", lambda device: gib)


def test_one_latent_is_decoded_at_a_time(vae):
    latents = torch.randn(4, 4, 8, 8)
    pixels = decode.decode_pixels(vae, latents)
    assert vae.shapes == [(1, 8, 8)] * 4
    alone = [decode.decode_pixels(vae, one[None]) for one in latents]
    assert torch.equal(pixels, torch.cat(alone))


@pytest.mark.parametrize(("gib", "is_tiled"), [(None, False), (20.0, False), (3.0, True)])
def test_tiles_of_512_px_where_a_whole_picture_does_not_fit(vae, monkeypatch, gib, is_tiled):
    free(monkeypatch, gib)
    pixels = decode.decode_pixels(vae, torch.randn(1, 4, 128, 128))
    assert pixels.shape == (1, 3, 1024, 1024)
    assert max(side for _, *sides in vae.shapes for side in sides) == (64 if is_tiled else 128)
    assert not vae.use_tiling


def test_a_small_picture_needs_no_tiles(vae, monkeypatch):
    free(monkeypatch, 2.0)
    decode.decode_pixels(vae, torch.randn(1, 4, 64, 64))
    assert vae.shapes == [(1, 64, 64)]


def test_tiling_that_somebody_set_is_back_afterwards(vae, monkeypatch):
    free(monkeypatch, 1.0)
    vae.enable_tiling()
    with decode.tiled_where_short(vae, (1024, 1024), vae.device):
        assert vae.tile_latent_min_size == 64
    assert vae.use_tiling and vae.tile_latent_min_size == 128


def test_gpu_memory_counts_what_the_allocator_keeps_for_reuse(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
    assert gpu_memory.free_gib(torch.device("cuda")) == 5.0
    assert gpu_memory.free_gib(torch.device("cpu")) is None
