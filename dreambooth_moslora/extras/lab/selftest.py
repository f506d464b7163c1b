"""Tests what this project claims on a machine.

It trains on the device and on the CPU, and compares the results.

losses      the device's losses equal the CPU's, in full and half precision
published   the files of the device's run are verified (`lora.verify`)
repeated    whether two equal runs end with the same bytes: kernels that sum in a changing order
            give others
resumed     a run that was stopped and resumed on the device ends with the same bytes; both have
            `--deterministic` where equal runs differ, so that chance is told from a defect
generated   a picture drawn with the adapter on the device is not a single colour
compiled    the device's losses with compiled blocks, on Nvidia's and AMD's GPUs
cards       the losses of two processes, one on each of two GPUs, equal those of one
step        seconds and memory of a step of full-size SDXL with random weights, if memory allows,
            and their lower bound (`full_step`)

Each training is the training command, with the embedded base and painted photos.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageStat

from dreambooth_moslora.disk import run_folder
from dreambooth_moslora.disk.safetensors_header import split_content
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.plan.base_size import BaseSize
from dreambooth_moslora.plan.memory_plans import USABLE_RATIO, estimate_plans
from dreambooth_moslora.settings import memory_presets
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training.step import FALLBACK_NOTE

PROGRAM = (sys.executable, "-m", "dreambooth_moslora")
"""The command that is tested."""
TRAIN_STEPS = 6
"""Of each training."""
STOP_STEP = 3
"""The step after which one is stopped, to be resumed."""
TOLERANCE = {"no": 5e-3, "fp16": 5e-2, "bf16": 5e-2}
"""Largest relative difference of a loss to the CPU's in fp32, by precision; TF32 keeps 10 bits."""
FLAT_LEVELS = 2.0
"""Standard deviation, of 255 levels, below which a picture shows nothing."""
FULL_SIZE_PX = 1024
"""Resolution of the step that is measured on a GPU."""
CPU_PX = 512
"""Resolution of the step that is measured on a CPU."""
MEMORY_PLANS = tuple(
    name
    for name, plan in memory_presets.MEMORY_PLANS.items()
    if plan.keys() <= {"gradient_checkpointing"}
)
"""Memory plans with which it is tried, the fastest first: those that leave the base as it is."""
LAUNCHER = (sys.executable, "-m", "accelerate.commands.launch")
TWO_GPU_COMMAND = (*LAUNCHER, "--multi_gpu", "--num_processes", "2", "-m", "dreambooth_moslora")
"""The words that start the command in two processes."""
STEP_SEC = 600
"""A step that takes longer is left out."""
CPU_ENV = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
"""Environment of a training on the CPU."""


@dataclass(frozen=True)
class Finding:
    """Result of one test.

    name: of the test
    holds: whether it does
    line: a line about it
    """

    name: str
    holds: bool
    line: str


@dataclass
class SelfTest:
    """Trains and draws, and compares.

    folder: of the runs
    precisions: each is tried; "no" is fp32
    env: environment of the commands, which chooses the device
    program: the command
    free_gib: memory for a step of full-size SDXL; None leaves that out
    compiles: whether compiled blocks are tried too
    launcher: words that start two processes; without them that is left out
    """

    folder: Path
    precisions: tuple[str, ...] = ("no",)
    env: dict[str, str] = field(default_factory=dict)
    program: tuple[str, ...] = PROGRAM
    free_gib: float | None = None
    compiles: bool = False
    launcher: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.photos = self.folder / "photos"
        shutil.rmtree(self.photos, ignore_errors=True)
        self.photos.mkdir(parents=True)

        # photos of a disc, each on another plain ground
        for number in range(3):
            ground = (60 * number, 140, 200 - 60 * number)
            photo = Image.new("RGB", (160, 160), ground)
            left_px = 30 + 10 * number
            ImageDraw.Draw(photo).ellipse((left_px, 40, left_px + 80, 120), fill=(230, 60, 40))
            photo.save(self.photos / f"{number}.png")

    def run_tests(self) -> Iterator[Finding]:
        """Yields each result as soon as it is known. A run that fails is a result, and ends the
        test."""
        try:
            # the device against the CPU, in each precision
            expected = read_losses(SelfTest(self.folder, env=CPU_ENV).train("cpu"))
            for precision in self.precisions:
                losses = read_losses(self.train(f"device_{precision}", mixed_precision=precision))
                name = "fp32" if precision == "no" else precision
                difference = compute_largest_difference(losses, expected)
                line = (
                    f"{len(losses)} losses in {name}, "
                    f"at most {difference:.1e} from the CPU's in fp32"
                )
                yield Finding(f"losses, {name}", difference <= TOLERANCE[precision], line)

            # what the run itself proved of its files
            exports = self.get_run("device_no").read_events("export")
            difference = exports[0]["proof"]["max_relative_difference"]
            yield Finding("published", True, f"both files reload to {difference:.1e}")

            # what else the device can be asked for
            yield from self.check_resume()
            yield self.generated()
            if self.compiles:
                yield self.check_compiled()
            if self.launcher:
                yield self.check_cards()
            if self.free_gib is not None:
                yield self.measure_step(self.free_gib)
        except UserError as error:
            yield Finding("run", False, str(error))

    def check_resume(self) -> Iterator[Finding]:
        """Check whether a run repeats, and whether a resumed run equals an unbroken one."""
        # where equal runs differ, only deterministic kernels can tell a defect from chance
        self.train("again")
        is_exact = self.compare_runs("device_no", "again")
        whole = "device_no"
        deterministic = {}
        line = "two equal runs have the same bytes"
        if not is_exact:
            line = (
                "two equal runs have other bytes: "
                "kernels here sum in a changing order (--deterministic)"
            )
            whole = "exact"
            deterministic = {"deterministic": "true"}
            self.train(whole, **deterministic)
        yield Finding("repeated", True, line)

        # the first half, then the rest
        self.train("resumed", max_train_steps=STOP_STEP, **deterministic)
        self.train("resumed", resume_from_checkpoint="latest", **deterministic)
        holds = self.compare_runs(whole, "resumed")
        line = f"{'the same bytes as' if holds else 'other bytes than'} an unbroken run"
        yield Finding("resumed", holds, line + ("" if is_exact else ", both with --deterministic"))

    def compare_runs(self, run_name: str, other_run_name: str) -> bool:
        """Return whether two runs have published the same tensors, whatever their headers say."""
        first, second = (self.read_tensor_bytes(name) for name in (run_name, other_run_name))
        return first == second

    def read_tensor_bytes(self, name: str) -> bytes:
        """Return the tensors of the run's adapter file, without its header."""
        content = self.get_run(name).adapter_path.read_bytes()
        return split_content(content)[1]

    def check_compiled(self) -> Finding:
        """Compare the losses of compiled blocks. Where they cannot be compiled, as without a
        compiler, the trainer reports it and goes on; that is no failure."""
        losses = read_losses(self.train("compiled", compile="on"))
        difference = compute_largest_difference(losses, read_losses(self.get_run("device_no")))
        line = f"losses with compiled blocks, at most {difference:.1e} from those without"
        if FALLBACK_NOTE in (self.folder / "compiled.log").read_text(encoding="utf-8"):
            line = f"compiled blocks cannot be made here; {FALLBACK_NOTE}"
        return Finding("compiled", difference <= TOLERANCE["no"], line)

    def check_cards(self) -> Finding:
        """Check that one process with two micro-batches draws what two processes draw with one
        each."""
        expected = read_losses(
            self.train("one_card", train_batch_size=1, gradient_accumulation_steps=2)
        )
        losses = read_losses(self.train("two_cards", self.launcher, train_batch_size=1))
        difference = compute_largest_difference(losses, expected)
        line = (
            f"{len(expected)} losses of two processes, at most {difference:.1e} from those of one"
        )
        return Finding("cards", difference <= TOLERANCE["no"], line)

    def generated(self) -> Finding:
        """Check that a picture is not one colour, as when the device drew not-a-numbers, or
        nothing."""
        arguments = ["--adapter", self.get_run("device_no").path]
        arguments += ["--prompt", "a photo of a sks robot"]
        arguments += ["--steps", "8"]
        arguments += ["--output_dir", self.folder / "pictures"]
        self.run_command("generate", [*self.program, "generate", *arguments])
        picture = next((self.folder / "pictures").glob("*.png"))
        spread = min(ImageStat.Stat(Image.open(picture).convert("RGB")).stddev)
        line = f"{picture.name}, {spread:.0f} levels of spread"
        return Finding("generated", spread > FLAT_LEVELS, line)

    def measure_step(self, free_gib: float, size: str = "sdxl") -> Finding:
        """Measure a step by the fastest plan that fits. Too little memory or time is no failure."""
        # the fastest plan whose estimate fits
        is_gpu = self.env != CPU_ENV
        px = FULL_SIZE_PX if is_gpu else CPU_PX
        half = self.precisions[-1] if is_gpu and len(self.precisions) > 1 else "bf16"
        config = TrainConfig(resolution=px, train_batch_size=1, rank=16, mixed_precision=half)
        needs = estimate_plans(config, BaseSize())
        listed = ", ".join(f"{name} {gib:.1f} GiB" for name, gib in needs.items())
        estimate_line = f"--memory at {px} px needs {listed}"
        # Not every plan is possible on every device.
        fitting = (
            name for name in MEMORY_PLANS if needs.get(name, math.inf) <= USABLE_RATIO * free_gib
        )
        plan = next(fitting, None)
        if plan is None:
            return Finding("step", True, f"left out: {free_gib:.1f} GiB are free; {estimate_line}")

        # in a process of its own, whose peak is the step's
        arguments = ["--size", size, "--resolution", str(px), "--mixed_precision", half]
        arguments += ["--gradient_checkpointing"] if memory_presets.MEMORY_PLANS[plan] else []
        command = [sys.executable, "-m", "dreambooth_moslora.extras.lab.full_step", *arguments]
        try:
            measured = json.loads(self.run_command("step", command, STEP_SEC).splitlines()[-1])
        except subprocess.TimeoutExpired:
            line = f"left out: four steps take longer than {STEP_SEC} s here; {estimate_line}"
            return Finding("step", True, line)
        line = f"{measured['step_sec']:.2f} s at {px} px, the floor {measured['floor_sec']:.2f} s"
        line += f", peak {measured['peak_gib']:.1f} GiB ({plan}); {estimate_line}"
        return Finding("step", True, line)

    def get_run(self, name: str) -> run_folder.RunDir:
        """Return the run folder of a training."""
        return run_folder.RunDir(self.folder / name)

    def train(self, name: str, launcher: Sequence[str] = (), **changes) -> run_folder.RunDir:
        """Train on the toy base, with these settings changed. Raises UserError when it fails."""
        # small and quick, and equal but for what is compared
        settings = {
            "pretrained_model_name_or_path": "toy",
            "instance_data_dir": self.photos,
            "output_dir": self.get_run(name).path,
            "instance_prompt": "a photo of a sks robot",
            "resolution": 128,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "lr_warmup_steps": 0,
            "max_train_steps": TRAIN_STEPS,
            "num_validation_images": 0,
            "report_to": "none",
            "seed": 0,
        }
        arguments = []
        for key, value in (settings | changes).items():
            arguments += [f"--{key}", value]
        self.run_command(name, [*(launcher or self.program), "train", *arguments])
        return self.get_run(name)

    def run_command(
        self, name: str, command: Sequence[object], timeout_sec: float | None = None
    ) -> str:
        """Run a command; returns its output. Raises UserError with the last line of its error
        output when it fails."""
        done = subprocess.run(
            [str(word) for word in command],
            env=os.environ | self.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_sec,
        )
        (self.folder / f"{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["nothing was said"]
            raise UserError(f"{name}: exit code {done.returncode}: {lines[-1]}")
        return done.stdout


def read_losses(run: run_folder.RunDir) -> list[float]:
    """Read the losses of the steps that were made: a step that fp16 skips is made again, and its
    loss may be infinite."""
    steps = [event for event in run.read_events() if event["type"] == "step"]
    return [event["loss"] for event in steps if not event.get("skipped")]


def compute_largest_difference(losses: list[float], expected: list[float]) -> float:
    """Largest relative difference of two lists of losses; infinite when one is missing or not
    finite."""
    if len(losses) != len(expected):
        return math.inf
    differences = [
        abs(loss - expected_loss) / abs(expected_loss)
        for loss, expected_loss in zip(losses, expected)
    ]
    # `max` would pass over a nan
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def format_page(facts: dict[str, str], findings: list[Finding]) -> str:
    """Markdown for a bug report: the machine and the results."""
    lines = ["# Self-test of dreambooth_moslora", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "| tried | holds | what was found |", "|---|---|---|"]
    for finding in findings:
        lines.append(
            f"| {finding.name} | {'yes' if finding.holds else '**no**'} | {finding.line} |"
        )
    return "\n".join(lines) + "\n"
