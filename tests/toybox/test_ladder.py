"""The ladder: a base that is right gives the renders back, and both families are measured on the
same ones."""

import pytest
import torch
from PIL import Image

from toybox.learning.train_unet import build_noise_schedule
from toybox.measures.ladder import STEPS, denoise_latents, main

LATENTS = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
CAPTIONS = [str(number) for number in range(len(LATENTS))]


@pytest.mark.parametrize("timestep", STEPS)
def test_true_velocities_give_the_latents_back(timestep):
    def truth(noisy, t, captions):
        latents = LATENTS[[int(caption) for caption in captions]]
        signal = build_noise_schedule().alphas_cumprod[t].sqrt()[:, None, None, None]
        noise = (noisy - signal * latents) / (1 - signal**2).sqrt()
        return signal * noise - (1 - signal**2).sqrt() * latents

    torch.testing.assert_close(
        denoise_latents(truth, LATENTS, CAPTIONS, timestep), LATENTS, atol=1e-3, rtol=0
    )
    none = denoise_latents(lambda noisy, *_: 0 * noisy, LATENTS, CAPTIONS, timestep)
    assert (none - LATENTS).square().mean() > 0.05


@pytest.mark.slow
def test_each_base_loses_more_from_more_noise_and_has_its_strip(tmp_path, capsys):
    main(["assets/toy-sdxl", "assets/toy-zimage", "--pictures", "2", "--out", str(tmp_path)])
    head, *rows = (line.split(" | ") for line in capsys.readouterr().out.splitlines())
    assert head == ["base", "autoencoder", *(f"t = {timestep}" for timestep in STEPS)]
    assert [row[0] for row in rows] == ["assets/toy-sdxl", "assets/toy-zimage"]
    for number, (_, *figures) in enumerate(rows, start=1):
        values = [float(figure) for figure in figures]
        assert values[-1] > 15 and values == sorted(values, reverse=True) and values[0] > 28
        assert Image.open(tmp_path / f"{number}.png").size == (2 * 128, 5 * 128)
