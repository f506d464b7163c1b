"""Set the half precision of a process, whatever it computed before."""

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dreambooth_moslora.base.devices import has_gpu
from dreambooth_moslora.precision import choose_half_precision

__all__ = ["build_bf16_accelerator", "build_half_accelerator"]


def build_bf16_accelerator() -> Accelerator:
    """On the CPU. accelerate keeps the first precision of a process and refuses another: forget it
    first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision="bf16", cpu=True)


def build_half_accelerator() -> Accelerator:
    """On the GPU, in the half precision that it has; without one in bf16."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=choose_half_precision() if has_gpu() else "bf16")
