"""How far one optimizer step moves the mixer compared with A, and whether MoSLoRA's first step is LoRA's.

    python -m benchmarks.mixer_motion [--width 1280] [--json FILE]

One projection, y = (W0 + s·B·M·A)·x with random G = dL/dΔW; docs/mixer_theory.md derives the expected values.

first step     ‖ΔW − ΔW_LoRA‖ / ‖ΔW_LoRA‖ after one step of SGD from B = 0, the same A in both      0
share of M     ‖dM·A‖ / ‖M·dA‖, the change of M·A that one step of Adam makes through M and through A     1/√r
rank of M      of the fixed butterfly [[I, I], [I, I]]                                              r/2
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from dreambooth_moslora.adapters.mixer import initial_mixer

__all__ = ["first_step_difference", "mixer_share", "rank_share"]

RANKS = (4, 16, 64)


def draw_a(rank: int, width: int, seed: int) -> Tensor:
    """A (r, in) as it starts: gaussian of standard deviation 1/r, fp64."""
    return torch.randn(rank, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / rank


def draw_gradient(width: int, seed: int) -> Tensor:
    """A random G (out, in) = dL/dΔW, fp64."""
    return torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def first_step_difference(rank: int, width: int) -> float:
    """Relative difference of ΔW after one step of SGD at rate 1: B = −G·Aᵀ·Mᵀ, and M = I for LoRA."""
    a, gradient = draw_a(rank, width, 0), draw_gradient(width, 1)
    m = initial_mixer("orthogonal", rank, 0, "layer").double()
    mixed = -(gradient @ a.T @ m.T) @ m @ a
    plain = -(gradient @ a.T) @ a
    return float((mixed - plain).norm() / plain.norm())


def mixer_share(rank: int, width: int) -> float:
    """‖dM·A‖ / ‖M·dA‖ for Adam's first step, which moves each number by the rate in its gradient's direction.

    B is no longer zero: it is the result of one step of Adam.
    """
    a, gradient = draw_a(rank, width, 0), draw_gradient(width, 1)
    m = initial_mixer("orthogonal", rank, 0, "layer").double()
    b = -(draw_gradient(width, 2) @ a.T @ m.T).sign()
    change_of_m = (b.T @ gradient @ a.T).sign()
    change_of_a = (m.T @ b.T @ gradient).sign()
    return float((change_of_m @ a).norm() / (m @ change_of_a).norm())


def rank_share(kind: str, rank: int) -> float:
    """Rank of M as it starts, divided by r."""
    return float(torch.linalg.matrix_rank(initial_mixer(kind, rank, 0, "layer").double())) / rank


def measure(width: int) -> list[dict[str, float]]:
    rows = []
    for rank in RANKS:
        rows.append(
            {
                "rank": rank,
                "first step": first_step_difference(rank, width),
                "share of M": mixer_share(rank, width),
                "1/sqrt(r)": rank**-0.5,
                "rank of butterfly / r": rank_share("butterfly", rank),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = measure(args.width)
    print("  ".join(f"{name:>22}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>22.3g}" for value in row.values()))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
