"""Runs with other losses: each reaches the step."""

import pytest

from dreambooth_moslora.disk.events import StepDone
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import paint_photos, tiny_config

OTHER = {
    "plain": {},
    "noise offset": {"noise_offset": 0.1},
    "huber": {"loss_type": "huber"},
    "smooth_l1": {"loss_type": "smooth_l1", "huber_schedule": "exponential"},
    "debiased": {"debiased_estimation_loss": True},
}


@pytest.mark.slow
def test_each_loss_reaches_the_step(tiny_base, tmp_path):
    photos, found = paint_photos(tmp_path / "photos"), {}
    for name, change in OTHER.items():
        events = []
        train(tiny_config(tiny_base, photos, tmp_path / name, max_train_steps=1, **change), events.append)
        found[name] = next(event.loss for event in events if isinstance(event, StepDone))
    assert len(set(found.values())) == len(OTHER)
