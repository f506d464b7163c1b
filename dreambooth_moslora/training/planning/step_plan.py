"""The arithmetic of a run: photos, repeats, batches and epochs into optimizer steps, and how often a photo is seen.

samples an epoch = photos × repeats, or the class images when there are more of those
steps an epoch = ⌈⌈samples / (batch × processes)⌉ / accumulation⌉        as diffusers' script counts
exposures of a photo = steps × accumulation × batch × processes / photos
"""

import math
from dataclasses import dataclass

from dreambooth_moslora.core.config import TrainConfig

__all__ = ["FEW_EXPOSURES", "StepPlan", "plan_steps", "samples_an_epoch", "uses_class_images"]

FEW_EXPOSURES = 20
"""Of a photo: below it, hardly anything of a subject is learnt."""


@dataclass(frozen=True)
class StepPlan:
    photo_count: int
    repeats: int
    photos_a_step: int
    steps_an_epoch: int
    total_steps: int

    @property
    def epochs(self) -> float:
        return self.total_steps / self.steps_an_epoch

    @property
    def exposures_a_photo(self) -> float:
        return self.total_steps * self.photos_a_step / self.photo_count

    def sentence(self) -> str:
        """All of it in one line."""
        return (
            f"{self.photo_count} photos × {self.repeats} repeats, {self.photos_a_step} a step: "
            f"{self.steps_an_epoch} steps an epoch; {self.total_steps} steps = {self.epochs:.1f} epochs; "
            f"each photo is seen about {self.exposures_a_photo:.0f} times"
        )


def plan_steps(config: TrainConfig, photo_count: int, process_count: int = 1) -> StepPlan:
    """Raises ZeroDivisionError for no photos: `photos.instance_photos` has refused that before."""
    samples = samples_an_epoch(photo_count, config.repeats)
    if uses_class_images(config):
        samples = max(samples, config.num_class_images)
    batches = math.ceil(samples / (config.train_batch_size * process_count))
    steps_an_epoch = math.ceil(batches / config.gradient_accumulation_steps)
    photos_a_step = config.train_batch_size * config.gradient_accumulation_steps * process_count
    total = config.max_train_steps or config.num_train_epochs * steps_an_epoch
    if config.exposures_per_photo:
        total = math.ceil(config.exposures_per_photo * photo_count / photos_a_step)
    return StepPlan(photo_count, config.repeats, photos_a_step, steps_an_epoch, total)


def samples_an_epoch(photo_count: int, repeats: int) -> int:
    """Of one set of photos: how often an epoch shows one of them."""
    return photo_count * repeats


def uses_class_images(config: TrainConfig) -> bool:
    return config.with_prior_preservation and config.prior == "class_images"
