"""What makes a run's steps faster on a GPU while changing only rounding, and whether it pays.

blocks compiled    `torch.compile` of the UNet's transformer blocks, each kind once (`--compile`)
channels last      convolutions in NHWC, the layout of tensor cores
cuDNN's search     tries algorithms at each convolution's first call; sizes must be fixed

On a CPU all are off; `--compile on` turns on the first.
"""

from dataclasses import dataclass

from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.training.planning.estimate import free_gib_of_gpu

__all__ = ["WORTH_IMAGES", "Speed", "speed_here", "speed_of"]

WORTH_IMAGES = 1000
"""Forward and backward passes of an image of 1024 px from which compilation pays. Not measured here: others
report about a minute to compile the blocks, and a tenth of a second saved per image."""


@dataclass(frozen=True)
class Speed:
    """What is on. `images` of 1024 px are those that a process still has to pass through the UNet."""

    compiled: bool
    channels_last: bool
    searches: bool
    images: float

    def sentence(self) -> str:
        length = f"the work of {self.images:.0f} images of 1024 px; on a GPU it pays from {WORTH_IMAGES} on"
        parts = [f"transformer blocks {'' if self.compiled else 'not '}compiled ({length})"]
        parts += ["convolutions channels-last"] * self.channels_last + ["cuDNN searches algorithms"] * self.searches
        return ", ".join(parts)


def speed_of(config: TrainConfig, device_type: str, steps: int) -> Speed:
    """The choice for `steps` optimizer steps on such a device. `auto` never compiles a base in 4 or 8 bit."""
    images = images_of(config, steps)
    is_cuda = device_type == "cuda"
    pays = is_cuda and images >= WORTH_IMAGES
    by_itself = config.compile == "auto" and pays and config.base_quantization == "none"
    return Speed(
        compiled=config.compile == "on" or by_itself,
        channels_last=is_cuda,
        searches=pays and not config.enable_bucket,
        images=images,
    )


def speed_here(config: TrainConfig, steps: int) -> Speed:
    """The choice on this machine, for a dry run. It looks for a GPU only where that matters."""
    is_long = images_of(config, steps) >= WORTH_IMAGES
    return speed_of(config, "cuda" if is_long and free_gib_of_gpu() is not None else "cpu", steps)


def images_of(config: TrainConfig, steps: int) -> float:
    copies = 2 if config.with_prior_preservation else 1
    images = steps * config.gradient_accumulation_steps * config.train_batch_size * copies
    return images * (config.resolution / 1024) ** 2
