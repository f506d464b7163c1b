"""What the mixer costs on PEFT's own forward: one projection, forward + backward, MoSLoRA relative to plain PEFT LoRA.

    python -m benchmarks.adapter_overhead [--rounds 60] [--dtype bf16] [--json FILE]

Both layers are timed in the same rounds, in an order drawn anew each round; the ratio is that of the medians.
The clock is the thread's own processor time on one thread, which other programs disturb least. The input needs
a gradient, as it does inside a network.
"""

import argparse
import json
import random
from pathlib import Path
from statistics import median
from time import thread_time

import torch
from peft import LoraConfig
from torch import Tensor, nn

from dreambooth_moslora.adapters.moslora import MoSLoraConfig, inject

SIZES = [(1280, 1024), (640, 4096)]  # (width, tokens) of SDXL's attention projections at 1024 px
RANKS = [4, 16, 64]
BOUND = 1.05


class Projection(nn.Module):
    """One attention projection with an adapter."""

    def __init__(self, width: int, rank: int, mixed: bool, dtype: torch.dtype):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False, dtype=dtype)
        plain = LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q"], init_lora_weights=False)
        own = MoSLoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q"], init_lora_weights=False)
        inject(self, own if mixed else plain)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(x)


def step(model: nn.Module, x: Tensor, grad: Tensor) -> float:
    """Processor seconds of one forward + backward."""
    model.zero_grad(set_to_none=True)
    x.grad = None
    start = thread_time()
    model(x).backward(grad)
    return thread_time() - start


def compare(width: int, tokens: int, rank: int, rounds: int, dtype: torch.dtype) -> dict[str, float]:
    """Median milliseconds of both, and their ratio."""
    torch.manual_seed(0)
    models = {"lora": Projection(width, rank, False, dtype), "moslora": Projection(width, rank, True, dtype)}
    x = torch.randn(1, tokens, width, dtype=dtype, requires_grad=True)
    grad = torch.randn(1, tokens, width, dtype=dtype)
    times = {name: [] for name in models}
    for round_number in range(rounds + 5):
        for name in random.Random(round_number).sample(sorted(models), len(models)):
            seconds = step(models[name], x, grad)
            if round_number >= 5:  # the first rounds warm caches and the allocator
                times[name].append(seconds)
    middle = {name: 1000 * median(values) for name, values in times.items()}
    return middle | {"ratio": middle["moslora"] / middle["lora"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="dtype of the base and the input")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    torch.set_num_threads(1)
    rows = []
    print(f"{'projection':>12} {'tokens':>7} {'rank':>5} {'LoRA ms':>9} {'MoSLoRA ms':>11} {'ratio':>7}   {args.dtype}")
    for width, tokens in SIZES:
        for rank in RANKS:
            row = compare(width, tokens, rank, args.rounds, dtype)
            rows.append({"width": width, "tokens": tokens, "rank": rank, "dtype": args.dtype, **row})
            print(
                f"{width:>5} → {width:<4} {tokens:>7} {rank:>5} {row['lora']:>9.2f} {row['moslora']:>11.2f} "
                f"{row['ratio']:>7.3f}{'' if row['ratio'] <= BOUND else '  over the bound'}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
