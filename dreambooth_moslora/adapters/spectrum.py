"""How far each projection's mixer has moved, how much of the adapter's rank is used, and rank reduction.

drift            ‖M − M₀‖ / ‖M₀‖, none for M₀ = 0                  how far the mixer has moved from its start
condition number σ₁(M) / σ_r(M)                                   infinite for a mixer that lost a direction
effective rank   exp(−Σ p ln p),  p = σ(B·M·A) / Σσ               Roy & Vetterli, EUSIPCO 2007
"""

from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from dreambooth_moslora.adapters.mixer import LowRank, MixedLowRank, initial_mixer
from dreambooth_moslora.core.errors import UserError


class Diagnosis(NamedTuple):
    """Figures of one projection; the mixer's are None without a mixer."""

    rank: int
    effective_rank: float
    drift: float | None
    condition_number: float | None


def product_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of up (out, r) · down (r, in) in fp64, without forming the (out, in) product: U (out, r), S (r,), Vh."""
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    left, sizes, right = torch.linalg.svd(r_up @ r_down.T)
    return q_up @ left[:, : len(sizes)], sizes, right[: len(sizes)] @ q_down.T


def leading_part(left: Tensor, sizes: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (out, n), S (n,), Vh (n, in) -> up (out, rank), down (rank, in): the best approximation of that rank,
    with equal norms."""
    root = sizes[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def effective_rank(sizes: Tensor) -> float:
    """Effective rank of singular values (r,); 0 for an adapter without an effect."""
    total = sizes.sum()
    if total == 0:
        return 0.0
    shares = sizes[sizes > 0] / total
    return float((-(shares * shares.log()).sum()).exp())


def mixer_figures(mixer: Tensor, kind: str, seed: int, path: str) -> tuple[float | None, float]:
    """(drift, condition number) of M (r, r). Its start is computed again from kind, seed and path."""
    start = initial_mixer(kind, len(mixer), seed, path).double()
    mixer = mixer.detach().cpu().double()
    sizes = torch.linalg.svdvals(mixer)
    smallest = float(sizes[-1])
    negligible = smallest <= len(mixer) * torch.finfo(torch.float32).eps * float(sizes[0])
    condition = float("inf") if negligible else float(sizes[0]) / smallest
    drift = float((mixer - start).norm() / start.norm()) if start.any() else None
    return drift, condition


def effective_rank_of(layer: LowRank) -> float:
    """Effective rank of ΔW = up·down, without forming it; convolution kernels are flattened."""
    return effective_rank(product_svd(layer.up.flatten(1), layer.down.flatten(1))[1])


@torch.no_grad()
def diagnose(matrices: MixedLowRank, kind: str, seed: int, path: str) -> Diagnosis:
    """Figures of the projection at `path`, whose mixer started as `kind` with `seed`.

    The scale s has no influence.
    """
    drift, condition = None, None
    if matrices.mixer is not None:
        drift, condition = mixer_figures(matrices.mixer, kind, seed, path)
    folded = replace(matrices, scale=1.0).fold()
    return Diagnosis(folded.rank, effective_rank_of(folded), drift, condition)


def summary(figures: dict[str, Diagnosis]) -> dict[str, float]:
    """Medians over the projections, and the largest drift, for a log line or a model card."""
    drifts = [f.drift for f in figures.values() if f.drift is not None]
    medians = {"effective_rank_median": median(f.effective_rank for f in figures.values())}
    if drifts:
        medians["mixer_drift_median"], medians["mixer_drift_max"] = median(drifts), max(drifts)
        conditions = [f.condition_number for f in figures.values() if f.condition_number is not None]
        medians["mixer_condition_median"] = median(conditions)
    return medians


def reduce_rank(layer: LowRank, keep: float) -> tuple[LowRank, float, float]:
    """The layer of lowest rank that keeps at least `keep` of ‖ΔW‖², and the squared norms before and after.

    DoRA's magnitudes do not change.
    """
    left, sizes, right = product_svd(layer.up.flatten(1), layer.down.flatten(1))
    energy = sizes.square().cumsum(0)
    enough = energy >= keep * energy[-1]
    rank = int(enough.nonzero()[0]) + 1
    up, down = leading_part(left, sizes, right, rank)
    down, up = down.view(rank, *layer.down.shape[1:]), up.view(-1, rank, *layer.up.shape[2:])
    return LowRank(down.float(), up.float(), magnitude=layer.magnitude), float(energy[-1]), float(energy[rank - 1])


@torch.no_grad()
def reduce_layers(
    components: dict[str, dict[str, LowRank]], keep: float
) -> tuple[dict[str, dict[str, LowRank]], float]:
    """Reduce every projection of every component; also returns the fraction of Σ‖ΔW‖² that is left.

    Raises UserError unless 0 < keep <= 1.
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep={keep} is not a share; choose a number above 0 and up to 1, such as 0.99")
    reduced, before, after = {}, 0.0, 0.0
    for component, layers in components.items():
        reduced[component] = {}
        for path, layer in layers.items():
            reduced[component][path], energy, left = reduce_rank(layer, keep)
            before, after = before + energy, after + left
    return reduced, after / before if before else 1.0
