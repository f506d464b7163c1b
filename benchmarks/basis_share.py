"""How much of an adapter a frozen basis can hold: the share of its ‖ΔW‖² inside the directions of A and B.

    python -m benchmarks.basis_share [ADAPTER] [--base toy] [--ranks 16 32 64] [--basis FILE]

share     Σ ‖Qᵀ·ΔW·P‖² / Σ ‖ΔW‖², with orthonormal P and Q of A's rows and B's columns: the best that M can do
random    the same for random directions: r²/(out·in) of each layer's norm
numbers   r² of all layers, and kB in fp16
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from dreambooth_moslora.adapters.basis import Basis, FileBasis, SvdBasis
from dreambooth_moslora.adapters.lora_file import read_adapter
from dreambooth_moslora.base.files import resolve_base
from dreambooth_moslora.base.load import load_pipeline
from dreambooth_moslora.core import find_asset

__all__ = ["share_of", "shares"]


def share_of(update: Tensor, down: Tensor, up: Tensor) -> tuple[float, float, float]:
    """(‖ΔW‖² inside the directions, inside random ones on average, whole) of an update (out, in, …), A and B."""
    whole = update.double().flatten(1)
    used = down.flatten(1).double().norm(dim=1) > 0
    rows, columns = torch.linalg.qr(down.flatten(1).double()[used].T)[0], torch.linalg.qr(up.double()[:, used])[0]
    square = float(whole.square().sum())
    inside = float((columns.T @ whole @ rows).square().sum())
    return inside, square * rows.shape[1] * columns.shape[1] / whole.numel(), square


def shares(adapter: Path, base: str, basis: Basis, rank: int) -> dict[str, float]:
    """The figures of one rank, over the UNet's layers of the adapter."""
    found, _ = read_adapter(adapter, load_pipeline(base)).parts["unet"]
    parts = [share_of(layer.delta, *basis.layer(path, rank)) for path, layer in found.items()]
    inside, random, whole = map(sum, zip(*parts, strict=True))
    numbers = rank**2 * len(parts)
    return {"rank": rank, "share": inside / whole, "random": random / whole, "numbers": numbers, "kB": numbers / 500}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", nargs="?", default=find_asset("assets/adapters/rocket.safetensors"))
    parser.add_argument("--base", default="toy")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--basis", help="a raw adapter file (default: the basis svd); it has one rank")
    args = parser.parse_args()
    basis = FileBasis(Path(args.basis)) if args.basis else SvdBasis(Path(resolve_base(args.base)))
    for rank in args.ranks:
        row = shares(Path(args.adapter), args.base, basis, rank)
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))


if __name__ == "__main__":
    main()
