"""Scores during a training from a few rough pictures: those of the embedded base cost a second
each."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dreambooth_moslora.evaluation import during_training


@contextmanager
def few_pictures(
    templates: int = 1,
    seeds: int = 1,
    class_images: int = 1,
    unrelated: int = 1,
    inference_steps: int = 6,
) -> Iterator[None]:
    """So many of each, while it is open. The product's own plan has three templates from two seeds,
    in 20 steps."""
    plan_of, size = (
        during_training.build_small_plan,
        (templates, seeds, class_images, unrelated, inference_steps),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            during_training, "build_small_plan", lambda *args: plan_of(*args).reduce_plan(*size)
        )
        yield
