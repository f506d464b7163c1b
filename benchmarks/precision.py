"""bf16 on one process, whatever the process did before."""

from accelerate import Accelerator
from accelerate.state import AcceleratorState

__all__ = ["bf16_accelerator"]


def bf16_accelerator(cpu: bool = True) -> Accelerator:
    """accelerate keeps the first precision of a process and refuses another: forget it first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision="bf16", cpu=cpu)
