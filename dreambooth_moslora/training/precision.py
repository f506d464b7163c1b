"""bf16 on Nvidia GPUs, which have it since Ampere (compute capability 8.0).

On older ones PyTorch emulates it, and says that it is supported; but cuDNN has no bf16 convolutions there,
so that a training would fail at its first step, or crawl.
"""

import os

import torch

from dreambooth_moslora.core.config import TrainConfig
from dreambooth_moslora.core.errors import UserError

__all__ = ["check_bf16"]


def check_bf16(config: TrainConfig) -> None:
    """Raises UserError for a run in bf16 on a GPU without it.

    Where no flag is given, `accelerate launch` names the precision in the environment.
    """
    is_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if is_on_cpu or not torch.cuda.is_available():
        return
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return
    asked = {"mixed_precision": precision, "prior_generation_precision": config.prior_generation_precision}
    for name, wanted in asked.items():
        if wanted == "bf16":
            major, minor = torch.cuda.get_device_capability()
            raise UserError(
                f"--{name} bf16: {torch.cuda.get_device_name()} (compute capability {major}.{minor}) has no "
                f"bf16, which begins at 8.0: give --{name} fp16."
            )
