"""What Muon costs in a training step of the embedded base's UNet: `torch.optim.Muon` beside `toybox.learning.muon`.

    python -m benchmarks.muon [--batch 64] [--steps 3]

Both get the same gradients, by turns, in the passes of one model. torch's iterates in bfloat16, which a processor
without its instructions emulates: there it takes most of a step. The first step of each is not counted. The
difference of the weights after the last step is a share of how far torch's have moved.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from toybox.learning.channels_last import to_channels_last, use_fast_group_norm
from toybox.learning.muon import GramMuon
from toybox.learning.train_unet import build_unet
from toybox.learning.training import compute_dtype

__all__ = ["main"]

RATE = 1e-3


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def weight_matrices(unet: nn.Module) -> list[Tensor]:
    """fp32 (out, in·k·k), as `MasterWeights` has them."""
    return [p.detach().float().flatten(1).clone() for p in unet.parameters() if p.ndim > 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="counted ones")
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = compute_dtype()
    unet = use_fast_group_norm(build_unet().train()).to(dtype, memory_format=torch.channels_last)
    start = weight_matrices(unet)
    copies = {kind: [nn.Parameter(w.clone()) for w in start] for kind in (torch.optim.Muon, GramMuon)}
    optimizers = {kind: kind(copy, lr=RATE, weight_decay=0.0) for kind, copy in copies.items()}
    noisy, t = to_channels_last(torch.randn(args.batch, 4, 16, 16), dtype), torch.randint(1000, (args.batch,))
    words, pooled = torch.randn(args.batch, 77, 256, dtype=dtype), torch.randn(args.batch, 160, dtype=dtype)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]]).repeat(args.batch, 1)}

    def passes() -> None:
        unet.zero_grad()
        (unet(noisy, t, words, added_cond_kwargs=added).sample - noisy).float().square().mean().backward()

    times: dict[str, list[float]] = {}
    for _ in range(args.steps + 1):
        times.setdefault("passes", []).append(seconds(passes))
        gradients = [p.grad.float().flatten(1) for p in unet.parameters() if p.ndim > 1]
        for kind, optimizer in optimizers.items():
            for copy, gradient in zip(copies[kind], gradients):
                copy.grad = gradient
            times.setdefault(f"{kind.__module__}.{kind.__name__}", []).append(seconds(optimizer.step))
    middle = {name: sorted(found[1:])[args.steps // 2] for name, found in times.items()}
    for name, sec in middle.items():
        rest = "" if name == "passes" else f", {args.batch / (middle['passes'] + sec):.2f} pictures a second"
        print(f"{name}: {sec:.3f} s{rest}")
    moved, apart = (
        torch.cat([(a - b).detach().flatten() for a, b in zip(copies[torch.optim.Muon], other)])
        for other in (start, copies[GramMuon])
    )
    print(f"difference: {float(apart.norm() / moved.norm()):.4f}")


if __name__ == "__main__":
    main()
