"""LoHa and LoKr as the plain LoRA that they are, exactly: products of products are products again.

    LoHa    ΔW = s (a·b) ∘ (c·d)     its rank is at most the product of the two ranks
    LoKr    ΔW = s W1 ⊗ W2           each of them whole, or a product; the ranks multiply

A layer whose shorter side is below that rank gets the whole ΔW, and a unit matrix beside it. A
Tucker core t is multiplied out first. n stands for in, or in·h·w of a convolution.
"""

from math import prod

import torch
from torch import Tensor

from dreambooth_moslora.method.mixer import Tensors

Factors = tuple[Tensor, Tensor]  # (out, r) and (r, n), for their product

LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}


def lora_of(parts: Tensors, size: tuple[int, ...]) -> Factors:
    """up (out, r) with the scale, and down (r, n), in fp32, of the parts of a layer (out, in, …).
    Raises ValueError."""
    outputs, inputs = size[0], prod(size[1:])
    matrices = {
        name: tensor.double()
        for name, tensor in parts.items()
        if name not in ("alpha", "dora_scale")
    }
    if not all(tensor.is_floating_point() for name, tensor in parts.items() if name != "alpha"):
        raise ValueError("whole numbers")
    fold = hadamard if matrices.keys() >= LOHA else kronecker
    up, down, rank = fold(matrices, outputs, inputs)
    if up.shape != (outputs, len(down)) or down.shape[1] != inputs:
        raise ValueError("another size")
    return (up * scale_of(parts, rank)).float(), down.float()


def scale_of(parts: Tensors, rank: int | None) -> float:
    """alpha/r; 1 without an alpha, and for LoKr of whole matrices (rank None)."""
    if rank is None or "alpha" not in parts:
        return 1.0
    if parts["alpha"].numel() != 1:
        raise ValueError("no alpha")
    return float(parts["alpha"]) / rank


def hadamard(parts: Tensors, outputs: int, inputs: int) -> tuple[Tensor, Tensor, int]:
    """LoHa's factors and its own rank. Raises ValueError."""
    check_names(parts, LOHA | {"hada_t1", "hada_t2"})
    rank = len(parts["hada_w1_b"])
    pairs = [
        factors(parts, f"hada_{name}", f"hada_{core}", outputs * inputs) for name, core in CORES
    ]
    for up, down in pairs:
        if up.shape != (outputs, len(down)) or down.shape[1] != inputs:
            raise ValueError("another size")
    (up, down), (other_up, other_down) = pairs
    if len(down) * len(other_down) >= min(outputs, inputs):
        return *whole((up @ down) * (other_up @ other_down)), rank
    return (
        (up[:, :, None] * other_up[:, None]).flatten(1),
        (down[:, None] * other_down[None]).flatten(0, 1),
        rank,
    )


CORES = (("w1", "t1"), ("w2", "t2"))
LOKR = {f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}


def kronecker(parts: Tensors, outputs: int, inputs: int) -> tuple[Tensor, Tensor, int | None]:
    """LoKr's factors and its own rank, None if it has two whole matrices. Raises ValueError."""
    check_names(parts, LOKR)
    pairs = [
        factors(parts, f"lokr_{name}", f"lokr_{core}", outputs * inputs) for name, core in CORES
    ]
    (up, down), (other_up, other_down) = pairs
    if (len(up) * len(other_up), down.shape[1] * other_down.shape[1]) != (outputs, inputs):
        raise ValueError("another size")
    rank = next((len(parts[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in parts), None)
    if len(down) * len(other_down) >= min(outputs, inputs):
        return *whole(torch.kron(up @ down, other_up @ other_down)), rank
    return torch.kron(up, other_up), torch.kron(down, other_down), rank


def factors(parts: Tensors, name: str, core: str, most: int) -> Factors:
    """The product that one matrix of LoHa or LoKr is; `most` numbers at most if it has a core."""
    if name in parts:
        return whole(parts[name].flatten(1))
    up, down = parts.get(f"{name}_a"), parts.get(f"{name}_b")
    if up is None or down is None or up.ndim != 2 or down.ndim != 2:
        raise ValueError("not whole")
    if core not in parts:
        if up.shape[1] != len(down):
            raise ValueError("two ranks")
        return up, down
    middle = parts[core]
    if middle.ndim != 4 or middle.shape[:2] != (len(up), len(down)):
        raise ValueError("two ranks")
    if up.shape[1] * down.shape[1] * middle.shape[2:].numel() > most:
        raise ValueError("another size")
    return whole(torch.einsum("ijhw,jn,io->onhw", middle, down, up).flatten(1))


def whole(change: Tensor) -> Factors:
    """A matrix (out, n) as a product of the rank of its shorter side."""
    unit = torch.eye(min(change.shape), dtype=change.dtype)
    return (unit, change) if len(change) <= change.shape[1] else (change, unit)


def check_names(parts: Tensors, known: set[str]) -> None:
    if not parts.keys() <= known or not all(tensor.numel() for tensor in parts.values()):
        raise ValueError("parts of something else")
