"""Pictures on a GPU with little memory: a model at a time, in tiles, and no size that cannot fit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from dreambooth_moslora.base import decode
from dreambooth_moslora.core import UserError
from dreambooth_moslora.generation import pipeline as gpu_room
from dreambooth_moslora.generation.params import GenerationParams, Image
from dreambooth_moslora.generation.pipeline import SubjectPipeline

PARAMS = GenerationParams("a photo of a sks dog", seed=3, steps=2, guidance_scale=4.0)
OTHER_DEVICE = "cpu:0"
"""Not the device named `cpu`, but with its memory: here models can really be moved, and draw."""
KIB = 2**-20
"""In GiB. The tiny base has 0.6 MiB of weights."""


def drawn(subject: SubjectPipeline, params: GenerationParams = PARAMS) -> np.ndarray:
    *_, last = subject.generate(params)
    assert isinstance(last, Image)
    return np.asarray(last.pixels)


@pytest.fixture
def offloads(monkeypatch):
    """The devices that the pipeline was asked to visit a model at a time."""
    asked: list[str] = []
    enable = StableDiffusionXLPipeline.enable_model_cpu_offload

    def noted(self, gpu_id=None, device=None):
        asked.append(str(device))
        return enable(self, gpu_id, device)

    monkeypatch.setattr(StableDiffusionXLPipeline, "enable_model_cpu_offload", noted)
    return asked


def free(monkeypatch, gib: float) -> None:
    for module in (gpu_room, decode):
        monkeypatch.setattr(module, "free_gib", lambda device: gib)


def test_a_small_gpu_holds_one_model_at_a_time_and_draws_the_same(tiny_base, monkeypatch, offloads):
    expected = drawn(SubjectPipeline.from_base(tiny_base))
    assert not offloads
    weights = gpu_room.weights_gib(SubjectPipeline.from_base(tiny_base).pipeline)
    free(monkeypatch, 1.4 * weights)
    monkeypatch.setattr(gpu_room, "UNET_BYTES_A_PIXEL", 1e-9)
    small = SubjectPipeline.from_base(tiny_base, device=OTHER_DEVICE)
    assert [drawn(small).tolist() for _ in range(2)] == [expected.tolist()] * 2
    assert set(offloads) == {OTHER_DEVICE}
    hooked = [part for part in small.pipeline.components.values() if hasattr(part, "_hf_hook")]
    assert not hooked and small.pipeline.device == torch.device("cpu")


def test_a_large_gpu_keeps_all_models(tiny_base, monkeypatch, offloads):
    free(monkeypatch, 24.0)
    subject = SubjectPipeline.from_base(tiny_base, device=OTHER_DEVICE)
    drawn(subject)
    assert not offloads and not subject.home.is_resting


def test_a_size_that_cannot_fit_is_refused_before_the_first_step(tiny_base, monkeypatch):
    subject = SubjectPipeline.from_base(tiny_base, device=OTHER_DEVICE)
    free(monkeypatch, 100 * 100 * gpu_room.UNET_BYTES_A_PIXEL / 2**30)
    with pytest.raises(UserError, match="too little memory for 128 x 128 px: at most 96 x 96 px fit"):
        drawn(subject, GenerationParams("a dog", steps=1, height_px=128, width_px=128))


@pytest.mark.parametrize(
    ("free_gib", "weights_gib", "offloads", "side_px"),
    [
        (23.0, 6.5, False, 4000),
        (9.0, 6.5, True, 2048),  # 12 GB beside a desktop, 10 GB
        (7.2, 6.5, True, 2048),  # 8 GB
        (5.4, 6.5, True, 1024),  # 6 GB
    ],
)
def test_what_sdxl_may_draw_on_a_card(free_gib, weights_gib, offloads, side_px, monkeypatch):
    """In half precision: 6.5 GiB of weights, of which the UNet has 4.8."""
    monkeypatch.setattr(gpu_room, "weights_gib", lambda model: 4.8 if model == "unet" else weights_gib)
    home = gpu_room.Home(SimpleNamespace(device=torch.device("cpu"), unet="unet"), torch.device(OTHER_DEVICE))
    free(monkeypatch, free_gib)
    assert home.is_short == offloads
    if not offloads:
        home.is_resting = False
        free(monkeypatch, free_gib - weights_gib)
    home.check_size(side_px, side_px)
    with pytest.raises(UserError, match="too little memory"):
        home.check_size(3 * side_px, 3 * side_px)


def test_the_pipeline_decodes_in_tiles_where_memory_is_short(tiny_base, monkeypatch):
    subject = SubjectPipeline.from_base(tiny_base)
    tiles: list[torch.Size] = []
    subject.pipeline.vae.decoder.register_forward_pre_hook(lambda _, inputs: tiles.append(inputs[0].shape[-2:]))
    monkeypatch.setattr(decode, "TILE_PX", 32)
    monkeypatch.setattr(decode, "free_gib", lambda device: 1 * KIB)
    drawn(subject)
    assert max(tiles[1:]) == (4, 4)  # the first is no picture: previews learn their colours from it
