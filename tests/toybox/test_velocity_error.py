"""The error of velocities: nothing for the true ones, and less for a base than for one that says
nothing."""

import pytest
import torch

from toybox.learning.train_unet import build_noise_schedule
from toybox.measures.velocity_error import BATCH, TIMESTEPS, compute_error, main

LATENTS = torch.randn(BATCH + 2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
CAPTIONS = [str(number) for number in range(len(LATENTS))]


def predict_true_velocity(noisy, t, captions):
    """Return the velocities of noised latents, whose captions are their indices."""
    latents = LATENTS[[int(caption) for caption in captions]]
    signal = build_noise_schedule().alphas_cumprod[t].sqrt()[:, None, None, None]
    noise = (noisy - signal * latents) / (1 - signal**2).sqrt()
    return signal * noise - (1 - signal**2).sqrt() * latents


def test_true_velocities_have_no_error():
    for timestep in TIMESTEPS:
        assert compute_error(predict_true_velocity, LATENTS, CAPTIONS, timestep) < 1e-8
        assert compute_error(
            lambda noisy, *_: 0 * noisy, LATENTS, CAPTIONS, timestep
        ) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_both_families_are_measured_on_the_same_renders(capsys):
    main(["assets/toy-sdxl", "assets/toy-zimage", "--pictures", "3"])
    head, *rows = (line.split(" | ") for line in capsys.readouterr().out.splitlines())
    assert head == ["base", *(f"t = {timestep}" for timestep in TIMESTEPS)]
    assert [row[0] for row in rows] == ["assets/toy-sdxl", "assets/toy-zimage"]
    for _, *values in rows:
        assert all(0.05 < float(value) < 0.6 for value in values)
