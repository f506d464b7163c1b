"""How much memory a GPU has left, and what decoding a picture takes of it.

PyTorch is loaded when it is asked.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["DECODER_BYTES_A_PIXEL", "GIB", "TILE_PX", "free_gib"]

GIB = 2**30
DECODER_BYTES_A_PIXEL = 4300
"""Peak of the fp32 decoder of SDXL's VAE beside its weights, a pixel of the picture."""
TILE_PX = 512
"""Side of the tiles that are decoded where a whole picture does not fit."""


def free_gib(device: "torch.device") -> float | None:
    """GiB that this process can still use on a CUDA device; None for every other kind of device.

    The allocator keeps freed blocks for reuse: they are free too.
    """
    if device.type != "cuda":
        return None
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + kept) / GIB
