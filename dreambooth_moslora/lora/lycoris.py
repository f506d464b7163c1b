"""Exact conversion of LoHa and LoKr to a plain LoRA: products of products are products again.

    LoHa    ΔW = s (a·b) ∘ (c·d)     its rank is at most the product of the two ranks
    LoKr    ΔW = s W1 ⊗ W2           each of them whole, or a product; the ranks multiply

A layer whose shorter side is below that rank gets the whole ΔW and an identity matrix instead. A
Tucker core t is multiplied out first. n stands for in, or in·h·w of a convolution.
"""

from math import prod

import torch
from torch import Tensor

from dreambooth_moslora.method.mixer import Tensors

Factors = tuple[Tensor, Tensor]
"""Matrices (out, r) and (r, n), which stand for their product."""

LOHA_PARTS = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}


def convert_to_lora(parts: Tensors, size: tuple[int, ...]) -> Factors:
    """Return up (out, r) with the scale, and down (r, n), in fp32, of a LoHa or LoKr layer.

    parts: the layer's tensors in the file
    size: of the layer's weight, (out, in, …)

    Raises ValueError, KeyError or RuntimeError for parts that make no such layer.
    """
    outputs, inputs = size[0], prod(size[1:])
    matrices = {
        name: tensor.double()
        for name, tensor in parts.items()
        if name not in ("alpha", "dora_scale")
    }
    fold = hadamard if matrices.keys() >= LOHA_PARTS else kronecker
    up, down, rank = fold(matrices, outputs, inputs)
    if up.shape != (outputs, len(down)) or down.shape[1] != inputs:
        raise ValueError("another size")

    # alpha/r; 1 without an alpha, and for LoKr of whole matrices
    scale = 1.0
    if rank is not None and "alpha" in parts:
        scale = float(parts["alpha"]) / rank
    return (up * scale).float(), down.float()


def hadamard(parts: Tensors, outputs: int, inputs: int) -> tuple[Tensor, Tensor, int]:
    """Return LoHa's factors and its rank. Raises ValueError for another size."""
    rank = len(parts["hada_w1_b"])
    up, down = get_factors(parts, "hada_w1", "hada_t1", outputs * inputs)
    other_up, other_down = get_factors(parts, "hada_w2", "hada_t2", outputs * inputs)
    if {(len(up), down.shape[1]), (len(other_up), other_down.shape[1])} != {(outputs, inputs)}:
        raise ValueError("another size")
    if len(down) * len(other_down) >= min(outputs, inputs):
        return *split_matrix((up @ down) * (other_up @ other_down)), rank
    return (
        (up[:, :, None] * other_up[:, None]).flatten(1),
        (down[:, None] * other_down[None]).flatten(0, 1),
        rank,
    )


def kronecker(parts: Tensors, outputs: int, inputs: int) -> tuple[Tensor, Tensor, int | None]:
    """Return LoKr's factors and its rank, None for two whole matrices.

    Raises ValueError for another size.
    """
    up, down = get_factors(parts, "lokr_w1", "lokr_t1", outputs * inputs)
    other_up, other_down = get_factors(parts, "lokr_w2", "lokr_t2", outputs * inputs)
    if (len(up) * len(other_up), down.shape[1] * other_down.shape[1]) != (outputs, inputs):
        raise ValueError("another size")
    rank = next((len(parts[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in parts), None)
    if len(down) * len(other_down) >= min(outputs, inputs):
        return *split_matrix(torch.kron(up @ down, other_up @ other_down)), rank
    return torch.kron(up, other_up), torch.kron(down, other_down), rank


def get_factors(parts: Tensors, name: str, core: str, max_numbers: int) -> Factors:
    """Return the two factors of one matrix of LoHa or LoKr.

    Raises ValueError for a core that would make more than `max_numbers` numbers, which could be
    more than the memory holds.
    """
    if name in parts:
        return split_matrix(parts[name].flatten(1))
    up, down = parts[f"{name}_a"], parts[f"{name}_b"]
    if core not in parts:
        return up, down
    if up.shape[1] * down.shape[1] * parts[core].shape[2:].numel() > max_numbers:
        raise ValueError("another size")
    return split_matrix(torch.einsum("ijhw,jn,io->onhw", parts[core], down, up).flatten(1))


def split_matrix(change: Tensor) -> Factors:
    """Return a matrix (out, n) as a product of the rank of its shorter side."""
    unit = torch.eye(min(change.shape), dtype=change.dtype)
    return (unit, change) if len(change) <= change.shape[1] else (change, unit)
