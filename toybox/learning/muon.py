"""Muon (Jordan et al., 2024) for processors that emulate bfloat16, in which `torch.optim.Muon`
iterates.

The quintic Newton-Schulz iteration X ← (aI + bG + cG²)·X, G = XXᵀ, replaces the singular values of
X by about 1. Its polynomials of G commute, so it is carried out on G (m,m) alone, and X (m,n) is
multiplied once, at the end. For a convolution's weight (n = 9m) this takes two fifths of the
operations. It needs fp32: rounding in G grows by a¹⁰.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["GramMuon", "orthogonalize"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MIN_NORM = 1e-7


def orthogonalize(matrix: Tensor) -> Tensor:
    """fp32 (m,n) -> the same with singular values between about 0.7 and 1.2, as far as they were
    not near zero."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.mT).mT
    a, b, c = COEFFICIENTS
    x = matrix / matrix.norm().clamp_min(MIN_NORM)
    gram = x @ x.mT
    product = identity = torch.eye(len(x), device=x.device)
    for _ in range(ITERATIONS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c) + a * identity
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x


def orthogonalize_each(matrices: list[Tensor]) -> list[Tensor]:
    """Orthogonalize a share of the matrices in each of several processes, and give all to all."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if world == 1:
        return [orthogonalize(matrix) for matrix in matrices]
    pieces = [
        orthogonalize(m) if i % world == rank else torch.zeros_like(m)
        for i, m in enumerate(matrices)
    ]
    flat = torch.cat([piece.flatten() for piece in pieces])
    dist.all_reduce(flat)
    return [
        piece.view_as(m) for piece, m in zip(flat.split([m.numel() for m in matrices]), matrices)
    ]


class GramMuon(torch.optim.Muon):
    """`torch.optim.Muon` with its defaults but the iteration's dtype, and with its state."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            directions = []
            for parameter in group["params"]:
                state, gradient = self.state[parameter], parameter.grad
                mean = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
                mean.lerp_(gradient, 1 - momentum)
                directions.append(gradient.lerp(mean, momentum))
            for parameter, update in zip(group["params"], orthogonalize_each(directions)):
                rows, columns = parameter.shape
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.sub_(update, alpha=rate * math.sqrt(max(1, rows / columns)))
