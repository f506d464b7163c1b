"""What the mixer has become, projection by projection, and how much of the adapter's rank is used.

drift            ‖M − M₀‖ / ‖M₀‖                                  how far the mixer has moved from its start
condition number σ₁(M) / σ_r(M)                                   infinite for a mixer that lost a direction
effective rank   exp(−Σ p ln p),  p = σ(B·M·A) / Σσ               Roy & Vetterli, EUSIPCO 2007
"""

from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dreambooth_moslora.mixer import MixedUp, initial_mixer
from dreambooth_moslora.moslora import adapter_layers, fold_layer

__all__ = ["Diagnosis", "diagnose", "diagnose_mixer", "diagnostics", "effective_rank", "product_svd", "summary"]


class Diagnosis(NamedTuple):
    """Figures of one projection; the mixer's are None where there is no mixer."""

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


def effective_rank(sizes: Tensor) -> float:
    """Of singular values (r,); 0 for an adapter that does nothing yet."""
    total = sizes.sum()
    if total == 0:
        return 0.0
    shares = sizes[sizes > 0] / total
    return float((-(shares * shares.log()).sum()).exp())


def diagnose_mixer(mixer: Tensor, kind: str, seed: int, path: str) -> tuple[float, float]:
    """(drift, condition number) of M (r, r); its start is made again from the kind, the seed and the path."""
    start = initial_mixer(kind, len(mixer), seed, path).double()
    mixer = mixer.detach().double().cpu()
    sizes = torch.linalg.svdvals(mixer)
    smallest = float(sizes[-1])
    negligible = smallest <= len(mixer) * torch.finfo(torch.float32).eps * float(sizes[0])
    condition = float("inf") if negligible else float(sizes[0]) / smallest
    return float((mixer - start).norm() / start.norm()), condition


def diagnose(up: Tensor, down: Tensor) -> tuple[int, float]:
    """(rank, effective rank) of up (out, r) · down (r, in), or of kernels (out, r, 1, 1) · (r, in, h, w)."""
    return len(down), effective_rank(product_svd(up.flatten(1), down.flatten(1))[1])


@torch.no_grad()
def diagnostics(model: nn.Module, adapter_name: str = "default") -> dict[str, Diagnosis]:
    """Module path -> figures, for each projection of a live adapter."""
    config, found = model.peft_config[adapter_name], {}
    for path, layer in adapter_layers(model, adapter_name).items():
        folded, lora_b = fold_layer(layer, adapter_name), layer.lora_B[adapter_name]
        drift, condition = None, None
        if isinstance(lora_b, MixedUp):
            drift, condition = diagnose_mixer(lora_b.mixer, config.mixer, config.mixer_seed, path)
        found[path] = Diagnosis(*diagnose(folded.up, folded.down), drift, condition)
    return found


def summary(figures: dict[str, Diagnosis]) -> dict[str, float]:
    """Medians over the projections, and the largest drift: what a log line or a model card shows."""
    drifts = [f.drift for f in figures.values() if f.drift is not None]
    facts = {"effective_rank_median": median(f.effective_rank for f in figures.values())}
    if drifts:
        facts["mixer_drift_median"], facts["mixer_drift_max"] = median(drifts), max(drifts)
        conditions = [f.condition_number for f in figures.values() if f.condition_number is not None]
        facts["mixer_condition_median"] = median(conditions)
    return facts
