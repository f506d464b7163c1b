"""Our step and the floor by turns in one process, on the same weights: their ratio, also where
others use the machine.

    python -m benchmarks.floor_ratio    # full-size SDXL, random weights: 9 GB of memory
    python -m benchmarks.floor_ratio --resolutions 1024 --steps 5 --json ratio.json
    python -m benchmarks.floor_ratio --size small --resolutions 64

The floor is the frozen UNet's forward and the gradient to its input. Each pair of steps gives a
ratio of seconds on the clock and one of the processor's; the medians are printed, and what our step
does beside `accumulate_gradients`.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.train_step import read_cpu_flags, time_step

__all__ = ["main", "measure"]

Step = Callable[[], object]


def copy_modules(model: torch.nn.Module) -> torch.nn.Module:
    """Copy the modules but share all tensors, so that the copy takes almost no memory."""
    # `deepcopy` takes what is in its memo for already copied
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def build_steps(size: str, resolution_px: int, rank: int) -> tuple[Step, Step, Step]:
    """(floor, gradients of a step, update of the adapter)."""
    from benchmarks.precision import build_bf16_accelerator
    from dreambooth_moslora.extras.lab.full_step import build_floor_step, build_random_inputs
    from dreambooth_moslora.settings.train_config import TrainConfig
    from dreambooth_moslora.training.step import TrainStep

    config = TrainConfig(
        instance_data_dir=".",
        instance_prompt="a photo of sks dog",
        resolution=resolution_px,
        rank=rank,
        train_batch_size=1,
        seed=0,
    )
    materials = build_random_inputs(size, resolution_px)
    unet = materials.pipeline.unet.requires_grad_(False)
    materials.pipeline.unet = copy_modules(unet)
    alone = build_floor_step(materials, config, torch.device("cpu"))
    materials.pipeline.unet = unet
    ours = TrainStep(config, materials, build_bf16_accelerator(), max_train_steps=100)
    losses: list[torch.Tensor] = []

    def gradients() -> None:
        losses[:] = [ours.accumulate_gradients()]

    return alone, gradients, lambda: ours.update_adapter(*losses)


def measure(
    size: str, resolution_px: int, rank: int, warmup: int, steps: int
) -> dict[str, str | float | list[float]]:
    """Medians over `steps` pairs: seconds of each, and the ratios on the clock and of the
    processor's seconds."""
    floor, gradients, update = build_steps(size, resolution_px, rank)
    rows = []
    for _ in range(warmup + steps):
        rows.append([time_step(step)[:2] for step in (floor, gradients, update)])
    rows = rows[warmup:]
    ratios = {
        name: [(g[i] + u[i]) / f[i] for f, g, u in rows]
        for i, name in enumerate(("clock", "processor"))
    }
    return {
        "resolution_px": resolution_px,
        "flags": read_cpu_flags(),
        **{
            f"{name}_sec": median(row[i][0] for row in rows)
            for i, name in enumerate(("floor", "gradients", "update"))
        },
        **{f"{name}_ratio": round(median(values), 3) for name, values in ratios.items()},
        **{
            f"{name}_ratios": [round(ratio, 3) for ratio in values]
            for name, values in ratios.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resolutions", nargs="+", type=int, default=[512, 1024], metavar="PX")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1, help="pairs before the clock counts")
    parser.add_argument("--steps", type=int, default=5, help="pairs that count")
    parser.add_argument("--size", default="sdxl", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write every figure here")
    args = parser.parse_args()
    from dreambooth_moslora.disk.processes import keep_freed_memory

    keep_freed_memory()
    measured = []
    for px in args.resolutions:
        row = measure(args.size, px, args.rank, args.warmup, args.steps)
        measured.append(row)
        seconds = ", ".join(
            f"{name} {row[f'{name}_sec']:.2f} s" for name in ("floor", "gradients", "update")
        )
        ratios = ", ".join(f"{name} {row[f'{name}_ratio']:.3f}" for name in ("clock", "processor"))
        print(f"{px} px: {seconds}; ours / floor: {ratios}; {row['flags']}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
