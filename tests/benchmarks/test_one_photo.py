"""The arms for one photo that no setting of the program has, and the photos of its editors."""

import pytest
import torch
from torch import nn

from benchmarks import one_photo
from benchmarks.one_photo import NoiseMask, squared_change
from dreambooth_moslora.evaluation.metrics import load_encoders
from dreambooth_moslora.method.moslora import MoSLoraConfig, fold, inject, lora_layers
from dreambooth_moslora.photos.synthetic import REJECTED, read_record

RANK = 4


class Denoiser(nn.Module):
    """A projection and a convolution, called as diffusers calls a UNet."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, tokens, timestep, pixels):
        return self.linear(tokens), self.conv(pixels)


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    config = MoSLoraConfig(r=RANK, lora_alpha=RANK, target_modules=["linear", "conv"])
    model = inject(Denoiser(), config)
    for layer in lora_layers(model):
        nn.init.normal_(layer.lora_B["default"].up)
    return model


def test_each_picture_passes_the_rows_of_its_noise_level(denoiser):
    inputs = torch.randn(2, 7, 6), torch.randn(2, 3, 8, 8)

    def run(time):
        return denoiser(inputs[0], timestep=time, pixels=inputs[1])

    whole = run(torch.tensor([0, 0]))
    NoiseMask(denoiser)
    with_mask = run(torch.tensor([0, 999]))
    for kept, masked in zip(whole, with_mask):
        torch.testing.assert_close(masked[0], kept[0])

    # At the highest noise level, half of the rows are gone.
    for layer in lora_layers(denoiser):
        layer.lora_B["default"].mixer.data[RANK // 2 :] = 0
    for masked, without in zip(with_mask, run(torch.tensor([0, 0]))):
        torch.testing.assert_close(masked[1], without[1])
        assert not torch.allclose(masked[0], without[0])


def test_the_square_of_the_change_is_that_of_the_folded_adapter(denoiser):
    changes = [layer.delta for layer in fold(denoiser).values()]
    expected = sum(change.square().sum() for change in changes)
    torch.testing.assert_close(squared_change(lora_layers(denoiser)), expected)


@pytest.mark.slow
def test_an_editors_photos_are_sorted_and_have_captions_and_masks(tmp_path, monkeypatch):
    monkeypatch.setattr(one_photo, "CANDIDATES", 3)
    folder = one_photo.photos_of("true", "duck", tmp_path, load_encoders("toy"))
    assert len(read_record(folder)) == 3
    made = sorted(path.stem for path in folder.glob("made_??.png"))
    assert made
    for stem in made:
        assert (folder / f"{stem}.txt").is_file() and (folder / f"{stem}.mask.png").is_file()
    assert not list((folder / REJECTED).glob("*.txt"))
