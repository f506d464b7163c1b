"""Loading of the frozen base: its precision, companion and quantization."""

import logging

import torch
from diffusers import DiffusionPipeline

from dreambooth_moslora.base import devices, families, load, model_files
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.quantization import quantize
from dreambooth_moslora.lora import companion
from dreambooth_moslora.settings.train_config import TrainConfig

logger = logging.getLogger(__name__)

SLOW_FP32_WARNING = (
    "The base trains in fp32, which takes twice the memory and several times the time: "
    "give --mixed_precision %s."
)


def load_base(
    config: TrainConfig,
    base: Base,
    dtype: torch.dtype,
    device: torch.device,
    *,
    has_denoiser: bool = True,
) -> DiffusionPipeline:
    """Load the base.

    config: says how it is quantised
    base: what to load
    dtype: of its weights
    device: where it is quantised
    has_denoiser: whether that is loaded too

    Raises UserError for a base that cannot be loaded.
    """
    # SDXL's own VAE overflows in fp16. A flow model's does not, and one that is named may be
    # made for it.
    vae_dtype = dtype if base.vae or base.is_flow else torch.float32
    pipeline = load.load_pipeline(base, dtype=dtype, vae_dtype=vae_dtype, has_denoiser=has_denoiser)
    if has_denoiser:
        finish_denoiser(config, pipeline, dtype, device)

    # Image prompts are never trained.
    if hasattr(pipeline, "image_encoder"):
        pipeline.register_modules(image_encoder=None, feature_extractor=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def finish_denoiser(
    config: TrainConfig, pipeline: DiffusionPipeline, dtype: torch.dtype, device: torch.device
) -> None:
    """Add the companion, if there is one, to the weights, and quantise them. Raises UserError."""
    denoiser = families.get_denoiser(pipeline)
    if config.companion:
        companion.add_companion(companion.read_companion(config.companion, pipeline), denoiser)
    quantize(denoiser, config.base_quantization, dtype, device)


def warn_of_slow_precision(base: Base, dtype: torch.dtype, device: torch.device) -> None:
    """Warn when a base as large as SDXL would train in fp32 on a GPU."""
    is_small = base.resolution_px <= model_files.MAX_SMALL_BASE_PX
    if is_small or (device.type, dtype) != ("cuda", torch.float32):
        return
    half = devices.choose_family_precision(base.facts)
    if half != "no":
        logger.warning(SLOW_FP32_WARNING, half)
