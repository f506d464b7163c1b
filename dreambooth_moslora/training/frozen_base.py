"""Loads a run's frozen base: the pipeline to train, and one that draws before training."""

import logging
from collections.abc import Callable

import torch
from diffusers import StableDiffusionXLPipeline

from dreambooth_moslora.base.load import default_resolution, load_pipeline
from dreambooth_moslora.base.locate import SMALL_BASE_PX
from dreambooth_moslora.base.quantization import quantize
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.training.accelerator import DTYPES
from dreambooth_moslora.training.planning.precision import has_fast_bf16

__all__ = ["LoadBase", "drawing_pipeline", "load_base", "warn_of_slow_precision"]

logger = logging.getLogger(__name__)

LoadBase = Callable[[TrainConfig, torch.dtype, torch.device], StableDiffusionXLPipeline]

FP32_ON_A_GPU = (
    "The base trains in fp32, which takes twice the memory and several times the time: give --mixed_precision bf16 "
    "(fp16 on a GPU older than Ampere)."
)

BF16_ON_A_CPU = (
    "This CPU has no bf16, so PyTorch emulates it, many times slower than fp32: give --mixed_precision no, which "
    "takes twice the memory."
)


def load_base(config: TrainConfig, dtype: torch.dtype, device: torch.device) -> StableDiffusionXLPipeline:
    """Load the base. Its VAE is in fp32, as SDXL's own overflows in fp16; a VAE that the user names is in `dtype`.

    Raises UserError when it cannot be loaded.
    """
    pipeline = load_pipeline(
        config.pretrained_model_name_or_path,
        dtype=dtype,
        variant=config.variant,
        revision=config.revision,
        vae=config.pretrained_vae_model_name_or_path,
        cache_dir=config.cache_dir,
        vae_dtype=dtype if config.pretrained_vae_model_name_or_path else torch.float32,
    )
    quantize(pipeline.unet, config.base_quantization, dtype, device)
    pipeline.register_modules(image_encoder=None, feature_extractor=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawing_pipeline(
    config: TrainConfig, pipeline: StableDiffusionXLPipeline, device: torch.device
) -> StableDiffusionXLPipeline:
    """The base itself, or a copy in `prior_generation_precision` if that differs."""
    wanted = DTYPES.get(config.prior_generation_precision or "", pipeline.unet.dtype)
    if wanted == pipeline.unet.dtype:
        return pipeline
    return load_base(config, wanted, device)


def warn_of_slow_precision(pipeline: StableDiffusionXLPipeline, device: torch.device) -> None:
    """Warn when a base as large as SDXL would train in fp32 on a GPU, as it does when no precision is given, or in bf16
    on a CPU without it."""
    if default_resolution(pipeline) <= SMALL_BASE_PX:
        return
    if device.type == "cuda" and pipeline.unet.dtype == torch.float32:
        logger.warning(FP32_ON_A_GPU)
    if device.type == "cpu" and pipeline.unet.dtype == torch.bfloat16 and not has_fast_bf16():
        logger.warning(BF16_ON_A_CPU)
