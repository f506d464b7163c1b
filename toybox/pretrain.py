"""From renders to the assembled base in one command, which may be stopped at any time and run
again.

    python -m toybox.pretrain --minutes 120 --device cpu --work WORK

It calls the scripts of `toybox.data` and `toybox.learning` one after the other, each with its share
of the minutes. Finished results below WORK are kept and unfinished ones are resumed: training
states are saved every 100 steps, renders and latents in pieces. So `timeout 600 python -m
toybox.pretrain …` may be repeated until it prints where the base is, by default in WORK/assets. The
minutes are those of training, and of rendering on two cores; encoding and assembling take more
time. The judge and the ViT, which measure the base but are not part of it, have scripts of their
own (see `toybox/README.md`).
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from toybox import assemble
from toybox.data import cache_latents, render_dataset, sample_latents
from toybox.learning import build_tokenizer, sharpen_decoder, train_clip, train_unet, train_vae
from toybox.learning.train_unet import HELD_OUT_COUNT

__all__ = ["Plan", "Stage", "run_stages", "build_stages"]

RENDERS_PER_MINUTE = 200  # of --minutes: two cores need about a fifth of the time for them
MIN_RENDERS = 2 * HELD_OUT_COUNT
MAX_SAMPLES = 2000
# of the minutes; the rest is for the renders
SHARES = {"vae": 0.3, "clip": 0.08, "unet": 0.34, "decoder": 0.08}


@dataclass(frozen=True)
class Plan:
    """Options of the command line. `renders` and `steps` make a trial run shorter."""

    work: Path
    assets: Path
    minutes: float
    device: str = "cpu"
    renders: int | None = None
    steps: int = 10**6

    @property
    def count(self) -> int:
        return self.renders or max(MIN_RENDERS, round(RENDERS_PER_MINUTE * self.minutes))

    def build_training_arguments(self, name: str) -> list[str]:
        """Arguments of a training script: its output, length and device."""
        minutes = str(SHARES[name] * self.minutes)
        length = ["--steps", str(self.steps), "--minutes", minutes]
        return ["--out", str(self.work / name), *length, "--device", self.device]

    def build_path_arguments(self, **paths: str) -> list[str]:
        """Arguments that name files and folders below the work folder."""
        arguments = []
        for name, path in paths.items():
            arguments += [f"--{name}", str(self.work / path)]
        return arguments


@dataclass(frozen=True)
class Stage:
    """Script's main function, its arguments, and the file that it writes last, which marks its
    end."""

    name: str
    run: Callable[[list[str]], None]
    arguments: list[str]
    result: Path


def build_stages(plan: Plan) -> list[Stage]:
    """Build all stages, in their order."""
    towers = {"clip": "clip/model", "tokenizer": "tokenizer"}
    paths = {"data": "toys", "latents": "latents.safetensors"}
    workers = os.cpu_count() if plan.device == "cpu" else 1
    rendering = ["--count", str(plan.count), "--device", plan.device, "--workers", str(workers)]
    of_clip = plan.build_path_arguments(
        data="toys", tokenizer="tokenizer"
    ) + plan.build_training_arguments("clip")
    of_latents = plan.build_path_arguments(
        data="toys", vae="vae/model", clip="clip/model", out="latents.safetensors"
    )
    of_latents += ["--device", plan.device]
    of_unet = [
        *plan.build_path_arguments(**paths, **towers),
        "--batch",
        "64",
        *plan.build_training_arguments("unet"),
    ]
    of_samples = plan.build_path_arguments(
        data="toys", unet="unet/model", out="samples.safetensors", **towers
    )
    of_samples += ["--count", str(min(MAX_SAMPLES, plan.count)), "--device", plan.device]
    of_decoder = plan.build_path_arguments(
        data="toys", start="vae/model", samples="samples.safetensors"
    ) + plan.build_training_arguments("decoder")
    rows = [
        (
            "renders",
            render_dataset,
            plan.build_path_arguments(out="toys") + rendering,
            "toys/all.json",
        ),
        (
            "tokenizer",
            build_tokenizer,
            plan.build_path_arguments(data="toys", out="tokenizer"),
            "tokenizer/tokenizer_config.json",
        ),
        (
            "vae",
            train_vae,
            plan.build_path_arguments(data="toys") + plan.build_training_arguments("vae"),
            "vae/report.json",
        ),
        ("clip", train_clip, of_clip, "clip/report.json"),
        ("latents", cache_latents, of_latents, "latents.safetensors"),
        ("unet", train_unet, of_unet, "unet/report.json"),
        ("samples", sample_latents, of_samples, "samples.safetensors"),
        ("decoder", sharpen_decoder, of_decoder, "decoder/report.json"),
    ]
    return [
        Stage(name, script.main, arguments, plan.work / result)
        for name, script, arguments, result in rows
    ]


def run_stages(plan: Plan) -> Path:
    """Run the unfinished stages, then assemble; returns the folder of the base."""
    for stage in build_stages(plan):
        if stage.result.exists():
            print(f"{stage.name}: finished before", flush=True)
        else:
            print(f"{stage.name}: begins", flush=True)
            stage.run(stage.arguments)
    assemble.main(["--work", str(plan.work), "--assets", str(plan.assets)])
    return plan.assets / "toy-sdxl"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, required=True, help="minutes of training, in all sessions together"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate results")
    parser.add_argument(
        "--assets", type=Path, help="folder in which toy-sdxl is written (default: WORK/assets)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--renders", type=int, help="how many (default: 200 a minute, 2000 at least)"
    )
    parser.add_argument(
        "--steps", type=int, default=10**6, help="most steps of each training, for a trial"
    )
    args = parser.parse_args(argv)
    plan = Plan(
        args.work,
        args.assets or args.work / "assets",
        args.minutes,
        args.device,
        args.renders,
        args.steps,
    )
    print("the base is in", run_stages(plan))


if __name__ == "__main__":
    main()
