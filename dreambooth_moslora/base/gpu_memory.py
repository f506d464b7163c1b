"""A GPU's free memory, and the memory that decoding a picture needs.

PyTorch is imported only when asked.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["DECODER_BYTES_A_PIXEL", "GIB", "TILE_PX", "free_gib"]

GIB = 2**30
DECODER_BYTES_A_PIXEL = 4300
"""Peak of SDXL's fp32 VAE decoder beside its weights, per pixel of the picture."""
TILE_PX = 512
"""Side of the tiles that are decoded if the whole picture does not fit."""


def free_gib(device: "torch.device") -> float | None:
    """GiB that this process can still use on a CUDA device; None for other devices.

    Blocks that the allocator keeps for reuse count as free.
    """
    if device.type != "cuda":
        return None
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + kept) / GIB
