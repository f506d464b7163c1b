"""Memory and kernels of a training step, counted on the meta device: shapes without numbers, no
GPU.

A storage lives from the operation that makes it until the last tensor on it is gone, as in CUDA's
allocator. Attention is that of the flash kernels, which keep queries, keys, values, the result and
one number per row. Workspaces of cuDNN and the allocator's fragmentation are not counted.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["GIB", "Count", "Counter", "count_bytes", "patch_attention"]

GIB = 2**30
VIEWS = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
}
VIEWS |= {
    "detach",
    "alias",
    "split",
    "split_with_sizes",
    "chunk",
    "as_strided",
    "unbind",
    "reshape",
    "lift_fresh",
}
VIEWS |= {"empty", "empty_like"}
"""Operations that start no kernel."""


@dataclass(frozen=True)
class Count:
    """Tensors of a step: `kept_gib` after the forward pass, `peak_gib` at most; `kernels`
    started."""

    kept_gib: float
    peak_gib: float
    kernels: int


class Counter(TorchDispatchMode):
    """In its block, every new storage on the meta device is counted while it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.kernels = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # A mask that keeps its values on the CPU chooses among tensors that have none.
        if function is torch.ops.aten.where.self and args[1].is_meta:
            args = tuple(argument.to("meta") for argument in args)
        result = function(*args, **(kwargs or {}))
        self.kernels += function.overloadpacket.__name__ not in VIEWS
        inputs = {get_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if (
                isinstance(leaf, Tensor)
                and leaf.device.type == "meta"
                and get_key(leaf) not in inputs
            ):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), get_key(tensor)
        if key in self._seen:
            return
        self._seen.add(key)
        size = align_size(storage.nbytes())
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def get_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def align_size(size: int) -> int:
    """CUDA's allocator hands out blocks of 512 bytes."""
    return -(-size // 512) * 512


def count_bytes(module: nn.Module) -> int:
    """Bytes of all weights, in their current dtype."""
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


@contextmanager
def patch_attention() -> Iterator[None]:
    """Use the GPU's attention: on the meta device PyTorch would take the kernel that keeps all
    scores."""
    usual = F.scaled_dot_product_attention

    def flash(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        **_,
    ) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal
        )[0]

    F.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        F.scaled_dot_product_attention = usual
