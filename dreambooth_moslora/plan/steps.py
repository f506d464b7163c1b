"""The arithmetic of a run: from photos, repeats, batches and epochs to optimizer steps and exposures of a photo.

samples per epoch = photos × repeats, or the number of class images if larger
steps per epoch = ⌈⌈samples / (batch × processes)⌉ / accumulation⌉        as diffusers' script counts
exposures of a photo = steps × accumulation × batch × processes / photos

Several subjects are shown equally often. Each counts as if it had as many photos as the largest one: an epoch
shows each photo of that subject once, and photos of the others more often.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dreambooth_moslora.settings.table import TrainConfig

FEW_EXPOSURES = 20
"""Exposures of a photo below which hardly anything of a subject is learnt."""


@dataclass(frozen=True)
class StepPlan:
    """`photo_counts` holds the number of photos of each subject."""

    photo_counts: tuple[int, ...]
    repeats: int
    photos_a_step: int
    steps_an_epoch: int
    total_steps: int

    @property
    def epochs(self) -> float:
        return self.total_steps / self.steps_an_epoch

    @property
    def exposures_a_subject(self) -> float:
        return self.total_steps * self.photos_a_step / len(self.photo_counts)

    @property
    def exposures_a_photo(self) -> float:
        """Exposures of a photo of the subject with the most photos."""
        return self.exposures_a_subject / max(self.photo_counts)

    def sentence(self) -> str:
        """The plan in one line."""
        several = len(self.photo_counts) > 1
        counted = f"{len(self.photo_counts)} subjects, {' + '.join(map(str, self.photo_counts))} photos"
        seen = f"each photo is seen about {self.exposures_a_photo:.0f} times"
        return (
            f"{counted if several else f'{self.photo_counts[0]} photos'} × {self.repeats} repeats, "
            f"{self.photos_a_step} a step: "
            f"{self.steps_an_epoch} steps an epoch; {self.total_steps} steps = {self.epochs:.1f} epochs; "
            + (f"each subject is seen about {self.exposures_a_subject:.0f} times" if several else seen)
        )


def plan_steps(config: TrainConfig, photos: int | Sequence[int], process_count: int = 1) -> StepPlan:
    """`photos` is their number, or a list with the number for each subject.

    Raises ZeroDivisionError for no photos; `photos.instance_photos` refuses that before.
    """
    counts = (photos,) if isinstance(photos, int) else tuple(photos)
    photo_count = len(counts) * max(counts)
    samples = samples_an_epoch(photo_count, config.repeats)
    if uses_class_images(config):
        samples = max(samples, config.num_class_images)
    batches = math.ceil(samples / (config.train_batch_size * process_count))
    steps_an_epoch = math.ceil(batches / config.gradient_accumulation_steps)
    photos_a_step = config.train_batch_size * config.gradient_accumulation_steps * process_count
    total = config.max_train_steps or config.num_train_epochs * steps_an_epoch
    if config.exposures_per_photo:
        total = math.ceil(config.exposures_per_photo * photo_count / photos_a_step)
    return StepPlan(counts, config.repeats, photos_a_step, steps_an_epoch, total)


def samples_an_epoch(photo_count: int, repeats: int) -> int:
    """Samples per epoch of one set of photos."""
    return photo_count * repeats


def uses_class_images(config: TrainConfig) -> bool:
    return config.with_prior_preservation and config.prior == "class_images"
