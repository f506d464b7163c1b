"""The ladder: a base that is right gives the renders back, and both families are measured on the
same ones."""

import pytest
import torch
from PIL import Image

from tests.toybox.test_velocity_error import CAPTIONS, LATENTS, predict_true_velocity
from toybox.measures.ladder import STEPS, denoise_latents, main


@pytest.mark.parametrize("timestep", STEPS)
def test_true_velocities_give_the_latents_back(timestep):
    denoised = denoise_latents(predict_true_velocity, LATENTS, CAPTIONS, timestep)
    torch.testing.assert_close(denoised, LATENTS, atol=1e-3, rtol=0)
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
