"""Choose compilation and cuDNN's search, which make a run on a GPU faster and change only rounding.
On a CPU both are off; `--compile on` enables the first.

blocks compiled    `torch.compile` of the transformer blocks, each kind once (`--compile`)
cuDNN's search     tries algorithms at each convolution's first call; sizes must be fixed; not on
                   AMD's
"""

from dataclasses import dataclass

from dreambooth_moslora.base import devices
from dreambooth_moslora.settings import train_config

MIN_COMPILED_IMAGES = 1000
"""Forward and backward passes of an image of 1024 px from which compilation pays. Not measured
here: others report about a minute to compile the blocks, and a tenth of a second saved per image.
"""


@dataclass(frozen=True)
class Speed:
    """Choice of compilation and cuDNN's search.

    is_compiled: whether the blocks are
    has_cudnn_search: whether cuDNN searches algorithms
    """

    is_compiled: bool
    has_cudnn_search: bool

    def describe(self) -> str:
        """Return the choice as a sentence, for a dry run and the log."""
        sentence = "transformer blocks compiled, which makes later steps faster"
        if not self.is_compiled:
            sentence = "transformer blocks not compiled, which pays in a longer run on a GPU"
        if self.has_cudnn_search:
            sentence += ", cuDNN searches algorithms"
        return sentence


def choose_speed(config: train_config.TrainConfig, device_type: str, steps: int) -> Speed:
    """Return the choice for `steps` optimizer steps on such a device."""
    images = count_images(config, steps)
    pays = device_type == "cuda" and images >= MIN_COMPILED_IMAGES
    by_itself = config.compile == "auto" and pays

    # A search is lost when sizes change, and may choose another algorithm the next time.
    is_fixed = not config.has_buckets and not config.deterministic
    searches = pays and devices.has_fast_search() and is_fixed
    return Speed(
        is_compiled=config.compile == "on" or by_itself,
        has_cudnn_search=searches,
    )


def choose_local_speed(config: train_config.TrainConfig, steps: int) -> Speed:
    """Return the choice on this machine, for a dry run. It looks for a GPU only where that
    matters."""
    if devices.assumed_vram_gib.get():
        return choose_speed(config, "cuda", steps)
    is_long = count_images(config, steps) >= MIN_COMPILED_IMAGES
    is_on_gpu = is_long and not devices.is_variable_true("ACCELERATE_USE_CPU")
    return choose_speed(config, devices.get_best_device().type if is_on_gpu else "cpu", steps)


def count_images(config: train_config.TrainConfig, steps: int) -> float:
    """Return the number of images of 1024 px that so many steps pass through the denoiser."""
    images = steps * config.gradient_accumulation_steps * config.images_per_micro_batch
    areas = [(side / 1024) ** 2 for side in config.resolutions]
    return images * sum(areas) / len(areas)
