"""Smaller files: the lowest rank per projection that keeps a given share of ‖B·M·A‖² (Eckart & Young, 1936)."""

from typing import NamedTuple

import torch

from dreambooth_moslora.diagnostics import product_svd
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.moslora import FoldedLayer

__all__ = ["Reduction", "reduce_layers", "reduce_rank"]


class Reduction(NamedTuple):
    """What a reduction did to all projections together. `kept` is the share of Σ‖ΔW‖² that is left."""

    rank_before: int  # sum over the projections
    rank_after: int
    kept: float


def reduce_rank(layer: FoldedLayer, keep: float) -> tuple[FoldedLayer, float, float]:
    """The smallest-rank layer with at least `keep` of ‖ΔW‖², and both squared norms (before, after). DoRA stays."""
    left, sizes, right = product_svd(layer.up.flatten(1), layer.down.flatten(1))
    energy = sizes.square().cumsum(0)
    enough = energy >= keep * energy[-1]
    rank = int(enough.nonzero()[0]) + 1
    root = sizes[:rank].sqrt()
    down, up = root[:, None] * right[:rank], left[:, :rank] * root
    down, up = down.view(rank, *layer.down.shape[1:]), up.view(-1, rank, *layer.up.shape[2:])
    return FoldedLayer(down.float(), up.float(), layer.dora), float(energy[-1]), float(energy[rank - 1])


@torch.no_grad()
def reduce_layers(
    components: dict[str, dict[str, FoldedLayer]], keep: float
) -> tuple[dict[str, dict[str, FoldedLayer]], Reduction]:
    """Reduce every projection of every component. Raises UserError unless 0 < keep <= 1."""
    if not 0 < keep <= 1:
        raise UserError(f"keep={keep} is not a share; choose a number above 0 and up to 1, such as 0.99")
    reduced, before, after = {}, 0.0, 0.0
    for component, layers in components.items():
        reduced[component] = {}
        for path, layer in layers.items():
            reduced[component][path], energy, left = reduce_rank(layer, keep)
            before, after = before + energy, after + left
    ranks = [sum(len(f.down) for ls in c.values() for f in ls.values()) for c in (components, reduced)]
    return reduced, Reduction(*ranks, after / before if before else 1.0)
