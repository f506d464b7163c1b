"""What this machine's GPU can do: its free memory, and whether it computes bf16. PyTorch is imported only when asked.

Nvidia's GPUs compute bf16 since Ampere (compute capability 8.0), and CPUs with AVX-512, AMX or Arm's bf16. On older
GPUs PyTorch emulates bf16 and reports it as supported. cuDNN has no bf16 convolutions there, so training would fail at
its first step or be very slow. On other CPUs oneDNN has no bf16 kernels, and PyTorch's own are many times slower than
fp32.
"""

import os
import sys
from typing import Any

from dreambooth_moslora.core import UserError
from dreambooth_moslora.settings.table import TrainConfig

GIB = 2**30
DECODER_BYTES_A_PIXEL = 4300
"""Peak of SDXL's fp32 VAE decoder beside its weights, per pixel of the picture."""
ENCODER_BYTES_A_PIXEL = 2600
"""The same of its encoder."""
TILES_PX = (512, 256)
"""Sides of the tiles that are encoded and decoded if the whole picture does not fit; the largest that does."""


def best_device() -> Any:
    """The GPU of Nvidia or AMD, else Apple's, else the CPU: what training, pictures and the doctor use."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def is_on_apple() -> bool:
    """Whether a run here is on Apple's GPU. PyTorch is not asked on other systems."""
    return sys.platform == "darwin" and not asks_accelerate("ACCELERATE_USE_CPU") and best_device().type == "mps"


def apple_gib() -> tuple[float, float]:
    """GiB that Metal says a process should use at most, and what this process has of it."""
    import torch

    return torch.mps.recommended_max_memory() / GIB, torch.mps.current_allocated_memory() / GIB


def free_gib(device: Any) -> float | None:
    """GiB that this process can still use on a GPU, its allocator's own blocks too; None for other devices."""
    if device.type == "mps":
        most, used = apple_gib()
        return most - used
    if device.type != "cuda":
        return None
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + kept) / GIB


def free_unused_blocks(device: Any) -> None:
    """Give the blocks that a GPU's allocator keeps back to the driver."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def has_gpu() -> bool:
    """Whether PyTorch finds an Nvidia or AMD GPU, or Apple's."""
    return best_device().type != "cpu"


def has_fast_nhwc() -> bool:
    """Whether this GPU of Nvidia or AMD convolves channels-last fast. Of AMD only gfx9 does: on Radeon cards MIOpen
    is many times slower so, or copies each weight (pytorch #170947), and its search takes minutes."""
    import torch

    return not torch.version.hip or torch.cuda.get_device_properties().gcnArchName.startswith("gfx9")


def has_fast_bf16() -> bool:
    """Whether this CPU computes bf16 at least as fast as fp32, by what oneDNN says."""
    import torch

    try:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False


def asks_accelerate(variable: str) -> bool:
    """Whether `accelerate launch`, or the user, turned this on in the environment."""
    return os.environ.get(variable, "false").lower() in ("true", "1")


def check_bf16(config: TrainConfig) -> None:
    """Raises UserError for a run in bf16, by its flags or `accelerate launch`, on a GPU without it."""
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    asked = {"mixed_precision": precision, "prior_generation_precision": config.prior_generation_precision}
    flags = [flag for flag, wanted in asked.items() if wanted == "bf16"]
    if not flags or asks_accelerate("ACCELERATE_USE_CPU"):
        return
    import torch  # not before it is needed: a dry run answers at once

    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        major, minor = torch.cuda.get_device_capability()
        raise UserError(
            f"--{flags[0]} bf16: {torch.cuda.get_device_name()} (compute capability {major}.{minor}) has no "
            f"bf16, which begins at 8.0: give --{flags[0]} fp16."
        )
