"""Which half precision a GPU is for: bf16 where it multiplies it in hardware, else fp16."""

__all__ = ["half_precision"]

AMPERE = 8
"""The first compute capability of Nvidia's with bf16 convolutions and matrix products."""


def half_precision() -> str:
    """bf16 where the current GPU has it, else fp16. There must be a GPU."""
    import torch  # not before it is needed: a dry run answers at once

    return "bf16" if torch.cuda.get_device_capability()[0] >= AMPERE else "fp16"
