"""Memory and seconds of trainings by SDXL's recipe, by plan of `--memory`, beside the estimate.

    python -m benchmarks.recipe_memory --out FOLDER                       # on a GPU, full size
    python -m benchmarks.recipe_memory --out FOLDER --size small --plans stream   # on a CPU

FOLDER gets a base of random weights (6.5 GB; `build_random_sdxl`), unless it is there already, and
a run for each plan. It prints one line of JSON for each. On a GPU `memory_gib` plus 0.5 for CUDA's
context corresponds to `estimate_gib`; the excess is what workspaces and fragments take.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

from PIL import Image

from benchmarks.gpu_memory import estimate_total_gib
from benchmarks.random_sdxl import build_random_sdxl
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.settings.memory_presets import MEMORY_PLANS
from dreambooth_moslora.settings.train_config import TrainConfig

__all__ = ["main"]

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "assets" / "configs" / "sdxl.toml"
STEPS = 6
SMALL = {"resolution": 64, "rank": 2, "max_train_steps": 2, "gradient_accumulation_steps": 1}


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--size", choices=("sdxl", "small"), default="sdxl")
    options.add_argument(
        "--plans", nargs="+", choices=("auto", *MEMORY_PLANS), default=["auto", *MEMORY_PLANS]
    )
    options = options.parse_args(arguments)

    # A base and photos of plain colours.
    base, photos = options.out / f"base-{options.size}", options.out / "photos"
    if not base.is_dir():
        build_random_sdxl(options.size).save_pretrained(base, variant="fp16")
    photos.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        Image.new("RGB", (1024, 1024), (80 * number, 140, 90)).save(photos / f"{number}.png")

    for plan in options.plans:
        run = options.out / "runs" / f"{options.size}-{plan}"
        print(json.dumps(train_plan(plan, options.size, base, photos, run)), flush=True)


def train_plan(plan: str, size: str, base: Path, photos: Path, run: Path) -> dict:
    """Train by the recipe; returns what its steps said, or the last line of what it said when it
    failed."""
    settings = {
        "config": RECIPE,
        "pretrained_model_name_or_path": base,
        "instance_data_dir": photos,
        "instance_prompt": "a photo of a sks dog",
        "output_dir": run,
        "memory": plan,
        "max_train_steps": STEPS,
        "num_validation_images": 0,
        "report_to": "none",
        "seed": 0,
    }
    if size == "small":
        settings |= SMALL
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, str(ROOT / "train_dreambooth.py")]
    for name, value in settings.items():
        command.append(f"--{name}={value}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"plan": plan, "error": (done.stderr.strip() or "nothing was said").splitlines()[-1]}
    events = RunDir(run).read_events()
    steps = [event for event in events if event["type"] == "step"]
    measured = {
        "plan": plan,
        "size": size,
        "step_sec": round(median(step["step_sec"] for step in steps), 4),
        "memory_gib": round(max(step["memory_gib"] or 0 for step in steps), 2),
        "loss": steps[-1]["loss"],
        "grad_norm": steps[-1]["grad_norm"],
    }
    if size == "sdxl":
        # What `--dry_run` says of the settings that the plan came to.
        start = next(event for event in events if event["type"] == "start")
        config = TrainConfig(**start["config"])
        measured["estimate_gib"] = round(estimate_total_gib(config), 2)
    return measured


if __name__ == "__main__":
    main()
