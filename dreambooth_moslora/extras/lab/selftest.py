"""Tests what this project claims on a machine.

It trains on the device and on the CPU, and compares the results.

losses      the device's losses equal the CPU's, in full and half precision
published   the files of the device's run are verified (`lora.proof`)
repeated    whether two equal runs end with the same bytes: kernels that sum in a changing order
            give others
resumed     a run that was stopped and resumed on the device ends with the same bytes; both have
            `--deterministic` where equal runs differ, so that chance is told from a defect
generated   a picture drawn with the adapter on the device is not a single colour
compiled    the device's losses with compiled blocks, on Nvidia's and AMD's GPUs
cards       the losses of two processes, one on each of two GPUs, equal those of one
step        seconds and memory of a step of full-size SDXL with random weights, if memory allows,
            and their lower bound

Each training is the training command, with the embedded base and painted photos. The random UNet is
one random megabyte repeated, scaled by 1/sqrt(fan-in), so that activations neither grow nor vanish.

    python -m dreambooth_moslora.extras.lab.selftest

measures that step alone, and prints one line of JSON: `floor_sec` (the frozen UNet's forward pass
and the gradient of its input), `step_sec` (the trainer's step, with the update), and `peak_gib` of
the process, or of a GPU's tensors.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw, ImageStat

from dreambooth_moslora.base import load, pipelines
from dreambooth_moslora.disk import processes, run_folder
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.plan.distributed import DTYPES
from dreambooth_moslora.plan.memory import USABLE, BaseSize, costs
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training import photo_stream, prepare, reporter
from dreambooth_moslora.training.step import GOES_ON, TrainStep

WIDTHS = {"sdxl": (768, 1280), "small": (32, 64)}
"""Size of the UNet -> widths of its two texts. "sdxl" has 2.57 billion parameters, "small" the same
topology with a fortieth of the width."""


def random_unet(size: str, dtype: torch.dtype = torch.bfloat16) -> UNet2DConditionModel:
    """The UNet of stabilityai/stable-diffusion-xl-base-1.0 with random weights.

    `size` is one of WIDTHS.
    """
    full = size == "sdxl"
    time_width = 256 if full else 32
    narrow, wide = WIDTHS[size]  # of the two texts
    options = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280) if full else (32, 64, 64),
        "attention_head_dim": (5, 10, 20) if full else (1, 2, 2),
        "transformer_layers_per_block": (1, 2, 10) if full else (1, 1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_width,
        "projection_class_embeddings_input_dim": 6 * time_width + wide,
        "cross_attention_dim": narrow + wide,
    }
    return made(lambda: UNet2DConditionModel(**options), dtype)


def made(build: Callable[[], torch.nn.Module], dtype: torch.dtype) -> torch.nn.Module:
    """Build on the meta device, then fill: the modules' own initialisation of billions of numbers
    takes minutes."""
    with torch.device("meta"):
        module = torch.nn.Module.to(build(), dtype)
    module.to_empty(device="cpu")
    noise = noise_of(dtype)
    for part in module.modules():
        fill(part, noise)
    return module.eval()


def noise_of(dtype: torch.dtype) -> torch.Tensor:
    """What `fill` repeats. Its length is odd, so that no two rows of a matrix are equal."""
    return torch.randn(2**20 + 1, generator=torch.Generator().manual_seed(0)).to(dtype)


@torch.no_grad()
def fill(module: torch.nn.Module, noise: torch.Tensor) -> None:
    """Norms become 1 and 0, biases 0, matrices random, and buffers what their module computes."""
    for name, parameter in module.named_parameters(recurse=False):
        if name == "bias":
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1)
        else:
            # the noise again and again, scaled by 1/sqrt(fan-in)
            flat = parameter.view(-1)
            scaled = noise * (1 / math.sqrt(parameter[0].numel()))
            for start in range(0, flat.numel(), scaled.numel()):
                piece = flat[start : start + scaled.numel()]
                piece.copy_(scaled[: piece.numel()])
    for name, buffer in module.named_buffers(recurse=False):
        if name == "position_ids":
            buffer.copy_(torch.arange(buffer.shape[-1]))


def random_materials(
    size: str, resolution_px: int, dtype: torch.dtype = torch.bfloat16
) -> prepare.TrainInputs:
    """What a run prepares, of a random UNet and one random photo and prompt."""
    # a text of 77 tokens; its pooled vector is the wide encoder's
    embeds = torch.randn(77, sum(WIDTHS[size])).to(dtype)
    pooled = torch.randn(WIDTHS[size][1]).to(dtype)
    text = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    # a pipeline of which only the UNet and the schedule are used
    pipeline = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=random_unet(size, dtype),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    )
    side = resolution_px // 8
    return materials_of(
        pipeline,
        load.SDXL_FAMILY,
        text,
        latents=torch.randn(4, side, side),
        resolution_px=resolution_px,
        dtype=dtype,
    )


def materials_of(
    pipeline: DiffusionPipeline,
    family: pipelines.Family,
    text: pipelines.Text,
    latents: torch.Tensor,
    resolution_px: int,
    dtype: torch.dtype,
) -> prepare.TrainInputs:
    """What a run prepares, of one photo, whose prompts all have one text.

    pipeline: with the denoiser and the schedule
    family: of the base
    text: by the names of the pipeline's own arguments
    latents: (C, h, w) of the photo
    resolution_px: its side
    dtype: of the frozen base
    """
    # the one photo at each position, without a crop
    sizes = [resolution_px, resolution_px, 0, 0, resolution_px, resolution_px]
    ids = torch.tensor(sizes, dtype=torch.float32)
    shown = photo_stream.EncodedView(latents, ids, None), "a photo of sks dog"
    stream = SimpleNamespace(
        at=lambda position: shown,
        read_ahead=lambda position: None,
        subject_at=lambda position: 0,
    )
    return prepare.TrainInputs(
        pipeline=pipeline,
        family=family,
        schedule=prepare.noise_schedule(pipeline.scheduler),
        photos=[],
        instance=stream,
        prior=None,
        prompt_embeds=lambda prompts: [text] * len(prompts),
        dtype=dtype,
    )


GIB = 2**30
"""Bytes."""


def measure(size: str, config: TrainConfig) -> dict[str, float]:
    """Measure a batch as `config` says, on the device that accelerate chooses.

    Returns floor_sec, step_sec and peak_gib.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    materials = random_materials(size, config.resolution, DTYPES[config.mixed_precision])
    unet = materials.pipeline.unet.requires_grad_(False).to(accelerator.device)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()

    # the lower bound, before the trainer's step takes its memory
    floor_sec = second_of(floor_step(materials, config, accelerator.device), accelerator.device)
    train_step = TrainStep(config, materials, accelerator, max_train_steps=10)

    def step() -> None:
        train_step.accumulate_gradients()
        train_step.update_adapter()

    step_sec = second_of(step, accelerator.device)
    if accelerator.device.type == "cuda":
        peak_gib = torch.cuda.max_memory_allocated() / GIB
    else:
        peak_gib = reporter.memory_gib(accelerator.device)
    return {"floor_sec": floor_sec, "step_sec": step_sec, "peak_gib": peak_gib}


def floor_step(
    materials: prepare.TrainInputs, config: TrainConfig, device: torch.device
) -> Callable[[], None]:
    """One forward pass of the frozen UNet in training mode and its input's gradient: the lower
    bound of a step."""
    unet = materials.pipeline.unet.train()
    batch = materials.batch_at(0, config.train_batch_size, 1, bool)

    # what the UNet is told, on the device
    texts = []
    for text in materials.prompt_embeds(batch.prompts):
        texts.append(pipelines.in_dtype(text, device, materials.dtype))
    words = materials.family.arguments(texts)
    sizes = batch.time_ids.to(device)
    times = torch.tensor([500], device=device)

    def step() -> None:
        noisy = torch.randn_like(batch.latents, device=device, dtype=materials.dtype)
        noisy.requires_grad_()
        prediction = materials.family.predict(unet, noisy, times, sizes, **words)
        prediction.float().square().mean().backward()

    return step


def second_of(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of a second call of `step`; the first warms up."""
    # a GPU works on after the call has returned
    waits = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
    wait = waits.get(device.type, lambda: None)
    step()
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def main() -> None:
    """Measure one step, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--size", choices=WIDTHS, default="sdxl")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--mixed_precision", choices=("fp16", "bf16"), default="bf16")
    args = parser.parse_args()

    # as the training command does, whose step this is
    processes.keep_freed_memory()
    config = TrainConfig(
        rank=16,
        train_batch_size=1,
        seed=0,
        instance_data_dir=".",
        instance_prompt="a photo of sks dog",
        resolution=args.resolution,
        gradient_checkpointing=args.gradient_checkpointing,
        mixed_precision=args.mixed_precision,
    )
    print(json.dumps(measure(args.size, config)))


PROGRAM = (sys.executable, "-m", "dreambooth_moslora")
"""The command that is tested."""
STEPS = 6
"""Of each training."""
STOPPED_AT = 3
"""The step after which one is stopped, to be resumed."""
TOLERANCE = {"no": 5e-3, "fp16": 5e-2, "bf16": 5e-2}
"""Largest relative difference of a loss to the CPU's in fp32, by precision; TF32 keeps 10 bits."""
FLAT_LEVELS = 2.0
"""Standard deviation, of 255 levels, below which a picture shows nothing."""
FULL_PX = 1024
"""Resolution of the step that is measured on a GPU."""
CPU_PX = 512
"""Resolution of the step that is measured on a CPU."""
STEP_PLANS = ("full", "recompute")
"""Memory plans with which it is tried, the fastest first."""
LAUNCHER = (sys.executable, "-m", "accelerate.commands.launch")
ON_TWO_GPUS = (*LAUNCHER, "--multi_gpu", "--num_processes", "2", "-m", "dreambooth_moslora")
"""The words that start the command in two processes."""
STEP_SEC = 600
"""A step that takes longer is left out."""
ON_CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
"""Environment of a training on the CPU."""


@dataclass(frozen=True)
class Finding:
    """What one test has found.

    name: of the test
    holds: whether it does
    said: a line about it
    figures: numbers for the report's JSON
    """

    name: str
    holds: bool
    said: str
    figures: dict[str, float | str] = field(default_factory=dict)


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
            left = 30 + 10 * number
            ImageDraw.Draw(photo).ellipse((left, 40, left + 80, 120), fill=(230, 60, 40))
            photo.save(self.photos / f"{number}.png")

    def findings(self) -> Iterator[Finding]:
        """Yields each result as soon as it is known. A run that fails is a result, and ends the
        test."""
        try:
            # the device against the CPU, in each precision
            expected = losses(SelfTest(self.folder, env=ON_CPU).train("cpu"))
            for precision in self.precisions:
                found = losses(self.train(f"device_{precision}", mixed_precision=precision))
                name = "fp32" if precision == "no" else precision
                far = largest_difference(found, expected)
                yield Finding(
                    name=f"losses, {name}",
                    holds=far <= TOLERANCE[precision],
                    said=f"{len(found)} losses in {name}, at most {far:.1e} from the CPU's in fp32",
                    figures={"relative_difference": far},
                )

            # what the run itself proved of its files
            exports = self.run("device_no").read_metrics("export")
            far = exports[0]["proof"]["max_relative_difference"]
            yield Finding(
                name="published",
                holds=True,
                said=f"both files reload to {far:.1e}",
                figures={"relative_difference": far},
            )

            # what else the device can be asked for
            yield from self.resumed()
            yield self.generated()
            if self.compiles:
                yield self.compiled()
            if self.launcher:
                yield self.cards()
            if self.free_gib is not None:
                yield from self.step(self.free_gib)
        except UserError as error:
            yield Finding("run", False, str(error))

    def resumed(self) -> Iterator[Finding]:
        """Whether a run repeats, and whether a resumed run equals an unbroken one."""
        # where equal runs differ, only deterministic kernels can tell a defect from chance
        self.train("again")
        is_exact = self.are_equal("device_no", "again")
        whole = "device_no"
        words = {}
        said = "two equal runs have the same bytes"
        if not is_exact:
            said = (
                "two equal runs have other bytes: "
                "kernels here sum in a changing order (--deterministic)"
            )
            whole = "exact"
            words = {"deterministic": "true"}
            self.train(whole, **words)
        yield Finding("repeated", True, said)

        # the first half, then the rest
        self.train("resumed", max_train_steps=STOPPED_AT, **words)
        self.train("resumed", resume_from_checkpoint="latest", **words)
        holds = self.are_equal(whole, "resumed")
        said = f"{'the same bytes as' if holds else 'other bytes than'} an unbroken run"
        yield Finding("resumed", holds, said + ("" if is_exact else ", both with --deterministic"))

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two runs have published the same tensors, whatever their headers say."""
        first, second = (self.tensor_bytes(name) for name in (one, other))
        return first == second

    def tensor_bytes(self, name: str) -> bytes:
        """The bytes after the header of a safetensors file, whose length is in the first eight."""
        content = self.run(name).adapter_path.read_bytes()
        header_bytes = int.from_bytes(content[:8], "little")
        return content[8 + header_bytes :]

    def compiled(self) -> Finding:
        """Where it cannot be done, as without a compiler, the trainer says so and goes on; that is
        no failure."""
        found = losses(self.train("compiled", compile="on"))
        far = largest_difference(found, losses(self.run("device_no")))
        said = f"losses with compiled blocks, at most {far:.1e} from those without"
        if GOES_ON in (self.folder / "compiled.log").read_text(encoding="utf-8"):
            said = f"compiled blocks cannot be made here; {GOES_ON}"
        return Finding(
            name="compiled",
            holds=far <= TOLERANCE["no"],
            said=said,
            figures={"relative_difference": far},
        )

    def cards(self) -> Finding:
        """One process with two micro-batches draws what two processes draw with one each."""
        alone = losses(self.train("one_card", train_batch_size=1, gradient_accumulation_steps=2))
        found = losses(self.train("two_cards", self.launcher, train_batch_size=1))
        far = largest_difference(found, alone)
        return Finding(
            name="cards",
            holds=far <= TOLERANCE["no"],
            said=f"{len(alone)} losses of two processes, at most {far:.1e} from those of one",
            figures={"relative_difference": far},
        )

    def generated(self) -> Finding:
        """A picture that is one colour means that the device drew not-a-numbers, or nothing."""
        words = ["--adapter", self.run("device_no").path]
        words += ["--prompt", "a photo of a sks robot"]
        words += ["--steps", "8"]
        words += ["--output_dir", self.folder / "pictures"]
        self.call("generate", [*self.program, "generate", *words])
        picture = next((self.folder / "pictures").glob("*.png"))
        spread = min(ImageStat.Stat(Image.open(picture).convert("RGB")).stddev)
        said = f"{picture.name}, {spread:.0f} levels of spread"
        return Finding("generated", spread > FLAT_LEVELS, said)

    def step(self, free_gib: float, size: str = "sdxl") -> Iterator[Finding]:
        """Measure a step by the fastest plan that fits. Too little memory or time is no failure."""
        # the fastest plan whose estimate fits
        is_gpu = self.env != ON_CPU
        px = FULL_PX if is_gpu else CPU_PX
        half = self.precisions[-1] if is_gpu and len(self.precisions) > 1 else "bf16"
        config = TrainConfig(resolution=px, train_batch_size=1, rank=16, mixed_precision=half)
        needs = costs(config, BaseSize())
        listed = ", ".join(f"{name} {gib:.1f} GiB" for name, gib in needs.items())
        told = f"--memory at {px} px needs {listed}"
        plan = next((name for name in STEP_PLANS if needs[name] <= USABLE * free_gib), None)
        if plan is None:
            yield Finding(
                name="step",
                holds=True,
                said=f"left out: {free_gib:.1f} GiB are free; {told}",
                figures=needs,
            )
            return

        # in a process of its own, whose peak is the step's
        words = ["--size", size, "--resolution", str(px), "--mixed_precision", half]
        words += ["--gradient_checkpointing"] if plan != "full" else []
        command = [sys.executable, "-m", "dreambooth_moslora.extras.lab.selftest", *words]
        try:
            found = json.loads(self.call("step", command, STEP_SEC).splitlines()[-1])
        except subprocess.TimeoutExpired:
            yield Finding(
                name="step",
                holds=True,
                said=f"left out: four steps take longer than {STEP_SEC} s here; {told}",
                figures=needs,
            )
            return
        said = f"{found['step_sec']:.2f} s at {px} px, the floor {found['floor_sec']:.2f} s"
        said += f", peak {found['peak_gib']:.1f} GiB ({plan}); {told}"
        yield Finding(name="step", holds=True, said=said, figures={**found, **needs})

    def run(self, name: str) -> run_folder.RunDir:
        """The run folder of a training."""
        return run_folder.RunDir(self.folder / name)

    def train(self, name: str, launcher: Sequence[str] = (), **changes) -> run_folder.RunDir:
        """Train on the toy base, with these settings changed. Raises UserError when it fails."""
        # small and quick, and equal but for what is compared
        settings = {
            "pretrained_model_name_or_path": "toy",
            "instance_data_dir": self.photos,
            "output_dir": self.run(name).path,
            "instance_prompt": "a photo of a sks robot",
            "resolution": 128,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "lr_warmup_steps": 0,
            "max_train_steps": STEPS,
            "num_validation_images": 0,
            "report_to": "none",
            "seed": 0,
        }
        words = []
        for key, value in (settings | changes).items():
            words += [f"--{key}", value]
        self.call(name, [*(launcher or self.program), "train", *words])
        return self.run(name)

    def call(self, name: str, command: Sequence[object], timeout_sec: float | None = None) -> str:
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


def losses(run: run_folder.RunDir) -> list[float]:
    """The losses of the steps that were made: a step that fp16 skips is made again, and its loss
    may be infinite."""
    steps = [event for event in run.read_metrics() if event["type"] == "step"]
    return [event["loss"] for event in steps if not event.get("skipped")]


def largest_difference(found: list[float], expected: list[float]) -> float:
    """Largest relative difference of two lists of losses; infinite when one is missing or not
    finite."""
    if len(found) != len(expected):
        return math.inf
    differences = [abs(one - other) / abs(other) for one, other in zip(found, expected)]
    # `max` would pass over a nan
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


CLAIMS = {
    "published": "each file is loaded again and compared before it is kept",
    "resumed": "A stopped run resumes to the same bytes",
}
"""Name of a finding -> the README's words that it is a test of."""


def as_page(facts: dict[str, str], findings: list[Finding]) -> str:
    """Markdown for a bug report: the machine, the results, and the README's claims."""
    lines = ["# Self-test of dreambooth_moslora", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "| tried | holds | what was found |", "|---|---|---|"]
    for found in findings:
        lines.append(f"| {found.name} | {'yes' if found.holds else '**no**'} | {found.said} |")
    lines.append("")
    for found in findings:
        if found.name in CLAIMS:
            verdict = "holds here" if found.holds else "**does not hold here**"
            lines.append(f"- {CLAIMS[found.name]}: {verdict}")
    return "\n".join(lines) + "\n"


def as_json(facts: dict[str, str], findings: list[Finding]) -> str:
    """The same, with all figures, for a program."""
    return json.dumps({"machine": facts, "findings": [vars(found) for found in findings]}, indent=1)


if __name__ == "__main__":
    main()
