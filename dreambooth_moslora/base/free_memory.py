"""How much memory a GPU has left for this process."""

import torch

__all__ = ["GIB", "free_gib"]

GIB = 2**30


def free_gib(device: torch.device) -> float | None:
    """GiB that this process can still use on a CUDA device; None for every other kind of device.

    The allocator keeps freed blocks for reuse: they are free too.
    """
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + kept) / GIB
