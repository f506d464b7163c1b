"""The arithmetic of a run against numbers worked out by hand."""

import pytest

from dreambooth_moslora.plan.steps import plan_steps
from dreambooth_moslora.settings.table import TrainConfig


@pytest.mark.parametrize(
    ("batch", "accumulation", "repeats", "prior", "processes", "steps"),
    [
        (4, 1, 1, False, 1, 2),  # 7 photos: 2 batches
        (2, 3, 5, True, 2, 4),  # 37 class images are more than 35 photos: 10 batches, 4 steps of 3
        (1, 4, 2, True, 1, 10),  # 37 class images: 37 batches, 10 steps of 4
        (1, 1, 6, True, 1, 42),  # 42 photos are more than 37 class images
    ],
)
def test_an_epoch_has_the_steps_that_diffusers_script_counts(batch, accumulation, repeats, prior, processes, steps):
    config = TrainConfig(
        train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        repeats=repeats,
        with_prior_preservation=prior,
        class_prompt="a dog",
        num_class_images=37,
    )
    assert plan_steps(config, 7, processes).steps_an_epoch == steps


@pytest.mark.parametrize(
    ("batch", "accumulation", "processes", "steps"),
    [(1, 1, 1, 350), (4, 1, 1, 88), (2, 3, 2, 30)],  # 50 × 7 photos, 1, 4 and 12 a step
)
def test_exposures_a_photo_set_the_steps(batch, accumulation, processes, steps):
    sizes = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    plan = plan_steps(TrainConfig(exposures_per_photo=50, **sizes), 7, processes)
    assert plan.total_steps == steps
    assert 50 <= plan.exposures_a_photo < 50 + plan.photos_a_step / 7
