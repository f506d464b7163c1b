"""Tests what this project claims on a machine: trains on the device and on the CPU, and compares
the results.

losses      the device's losses equal the CPU's, in full and half precision
published   the files of the device's run are verified (`lora.proof`)
repeated    whether two equal runs end with the same bytes: kernels that sum in a changing order give others
resumed     a run that was stopped and resumed on the device ends with the same bytes, both with `--deterministic` where
            equal runs differ, so that chance is told from a defect
generated   a picture drawn with the adapter on the device is not a single colour
compiled    the device's losses with compiled blocks, on Nvidia's and AMD's GPUs
cards       those of two processes, one on each of two GPUs, equal those of one
step        seconds and memory of a step of full-size SDXL with random weights, if memory allows, and their
lower bound

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
    """stabilityai/stable-diffusion-xl-base-1.0's UNet."""
    full = size == "sdxl"
    time_width, (narrow, wide) = 256 if full else 32, WIDTHS[size]
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
            flat, scaled = parameter.view(-1), noise * (1 / math.sqrt(parameter[0].numel()))
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
    side = resolution_px // 8
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    embeds, pooled = (
        torch.randn(77, sum(WIDTHS[size])).to(dtype),
        torch.randn(WIDTHS[size][1]).to(dtype),
    )
    text = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = StableDiffusionXLPipeline(
        **parts, unet=random_unet(size, dtype), scheduler=scheduler
    )
    latents = torch.randn(4, side, side)
    return materials_of(pipeline, load.SDXL_FAMILY, text, latents, resolution_px, dtype)


def materials_of(
    pipeline: DiffusionPipeline,
    family: pipelines.Family,
    text: pipelines.Text,
    latents: torch.Tensor,
    resolution_px: int,
    dtype: torch.dtype,
) -> prepare.TrainInputs:
    """What a run prepares, of one photo's `latents` (C, h, w), whose prompts all have this text."""
    sizes = [resolution_px, resolution_px, 0, 0, resolution_px, resolution_px]
    ids = torch.tensor(sizes, dtype=torch.float32)
    shown = photo_stream.EncodedView(latents, ids, None), "a photo of sks dog"
    stream = SimpleNamespace(
        at=lambda position: shown,
        read_ahead=lambda position: None,
        subject_at=lambda position: 0,
    )
    schedule = prepare.noise_schedule(pipeline.scheduler)
    texts = lambda prompts: [text] * len(prompts)  # noqa: E731
    return prepare.TrainInputs(pipeline, family, schedule, [], stream, None, texts, dtype)


GIB = 2**30


def measure(size: str, config: TrainConfig) -> dict[str, float]:
    """Measure a batch as `config` says, on the device that accelerate chooses."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    materials = random_materials(size, config.resolution, DTYPES[config.mixed_precision])
    unet = materials.pipeline.unet.requires_grad_(False).to(accelerator.device)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    found = {
        "floor_sec": second_of(
            floor_step(materials, config, accelerator.device), accelerator.device
        )
    }
    train_step = TrainStep(config, materials, accelerator, max_train_steps=10)

    def step() -> None:
        train_step.accumulate_gradients()
        train_step.update_adapter()

    found["step_sec"] = second_of(step, accelerator.device)
    is_cuda = accelerator.device.type == "cuda"
    peak_gib = (
        torch.cuda.max_memory_allocated() / GIB
        if is_cuda
        else reporter.memory_gib(accelerator.device)
    )
    return found | {"peak_gib": peak_gib}


def floor_step(
    materials: prepare.TrainInputs, config: TrainConfig, device: torch.device
) -> Callable[[], None]:
    """One forward pass of the frozen UNet in training mode and its input's gradient: the lower
    bound of a step."""
    unet, batch = (
        materials.pipeline.unet.train(),
        materials.batch_at(0, config.train_batch_size, 1, bool),
    )
    texts = [
        pipelines.in_dtype(text, device, materials.dtype)
        for text in materials.prompt_embeds(batch.prompts)
    ]
    words, sizes = materials.family.arguments(texts), batch.time_ids.to(device)
    times = torch.tensor([500], device=device)

    def step() -> None:
        noisy = torch.randn_like(
            batch.latents, device=device, dtype=materials.dtype
        ).requires_grad_()
        materials.family.predict(
            unet, noisy, times, sizes, **words
        ).float().square().mean().backward()

    return step


def second_of(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of a second call of `step`; the first warms up."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(
        device.type, lambda: None
    )
    step()
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--size", choices=WIDTHS, default="sdxl")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--mixed_precision", choices=("fp16", "bf16"), default="bf16")
    args = parser.parse_args()
    processes.keep_freed_memory()
    fixed = {"rank": 16, "train_batch_size": 1, "seed": 0, "instance_data_dir": "."}
    asked = {
        name: getattr(args, name)
        for name in ("resolution", "gradient_checkpointing", "mixed_precision")
    }
    config = TrainConfig(**fixed, **asked, instance_prompt="a photo of sks dog")
    print(json.dumps(measure(args.size, config)))


PROGRAM = (sys.executable, "-m", "dreambooth_moslora")
STEPS, STOPPED_AT = 6, 3
# Of a loss to the CPU's in fp32; TF32 keeps 10 bits
TOLERANCE = {"no": 5e-3, "fp16": 5e-2, "bf16": 5e-2}
FLAT_LEVELS = 2.0  # Standard deviation, of 255 levels, below which a picture shows nothing
FULL_PX, CPU_PX = 1024, 512
STEP_PLANS = ("full", "recompute")
LAUNCHER = (sys.executable, "-m", "accelerate.commands.launch")
ON_TWO_GPUS = (*LAUNCHER, "--multi_gpu", "--num_processes", "2", "-m", "dreambooth_moslora")
STEP_SEC = 600
ON_CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Finding:
    name: str
    holds: bool  # whether the test does
    said: str  # a line about it
    figures: dict[str, float | str] = field(default_factory=dict)


@dataclass
class SelfTest:
    """Trains and draws with `program` and `env` in each of `precisions` ("no": fp32); measures SDXL
    if `free_gib`. `compiles`: compiled blocks are tried too. `launcher`: words that start two
    processes, if given."""

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
        for number in range(3):  # a disc on a plain ground
            photo = Image.new("RGB", (160, 160), (60 * number, 140, 200 - 60 * number))
            ImageDraw.Draw(photo).ellipse(
                (30 + 10 * number, 40, 110 + 10 * number, 120), fill=(230, 60, 40)
            )
            photo.save(self.photos / f"{number}.png")

    def findings(self) -> Iterator[Finding]:
        """Yields each result as soon as it is known. A run that fails is a result, and ends the
        test."""
        try:
            expected = losses(SelfTest(self.folder, env=ON_CPU).train("cpu"))
            for precision in self.precisions:
                found = losses(self.train(f"device_{precision}", mixed_precision=precision))
                name, far = (
                    "fp32" if precision == "no" else precision,
                    largest_difference(found, expected),
                )
                said = f"{len(found)} losses in {name}, at most {far:.1e} from the CPU's in fp32"
                yield Finding(
                    f"losses, {name}",
                    far <= TOLERANCE[precision],
                    said,
                    {"relative_difference": far},
                )
            proof = next(
                e["proof"] for e in self.run("device_no").read_metrics() if e["type"] == "export"
            )
            far = proof["max_relative_difference"]
            yield Finding(
                "published", True, f"both files reload to {far:.1e}", {"relative_difference": far}
            )
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
        self.train("again")
        is_exact, whole, words = self.are_equal("device_no", "again"), "device_no", {}
        said = "two equal runs have the same bytes"
        if not is_exact:
            said = "two equal runs have other bytes: kernels here sum in a changing order (--deterministic)"
            whole, words = "exact", {"deterministic": "true"}
            self.train(whole, **words)
        yield Finding("repeated", True, said)
        self.train("resumed", max_train_steps=STOPPED_AT, **words)
        self.train("resumed", resume_from_checkpoint="latest", **words)
        holds = self.are_equal(whole, "resumed")
        said = f"{'the same' if holds else 'other'} bytes {'than' if not holds else 'as'} an unbroken run"
        yield Finding("resumed", holds, said + ("" if is_exact else ", both with --deterministic"))

    def are_equal(self, one: str, other: str) -> bool:
        contents = [self.run(name).adapter_path.read_bytes() for name in (one, other)]
        first, second = (
            content[8 + int.from_bytes(content[:8], "little") :] for content in contents
        )
        return first == second

    def compiled(self) -> Finding:
        """Where it cannot be done, as without a compiler, the trainer says so and goes on; that is
        no failure."""
        far = largest_difference(
            losses(self.train("compiled", compile="on")), losses(self.run("device_no"))
        )
        said = f"losses with compiled blocks, at most {far:.1e} from those without"
        if GOES_ON in (self.folder / "compiled.log").read_text(encoding="utf-8"):
            said = f"compiled blocks cannot be made here; {GOES_ON}"
        return Finding("compiled", far <= TOLERANCE["no"], said, {"relative_difference": far})

    def cards(self) -> Finding:
        """One process with two micro-batches draws what two processes draw with one each."""
        alone = losses(self.train("one_card", train_batch_size=1, gradient_accumulation_steps=2))
        far = largest_difference(
            losses(self.train("two_cards", self.launcher, train_batch_size=1)), alone
        )
        said = f"{len(alone)} losses of two processes, at most {far:.1e} from those of one"
        return Finding("cards", far <= TOLERANCE["no"], said, {"relative_difference": far})

    def generated(self) -> Finding:
        words = [
            "--adapter",
            self.run("device_no").path,
            "--prompt",
            "a photo of a sks robot",
            "--steps",
            "8",
        ]
        words += ["--output_dir", self.folder / "pictures"]
        self.call("generate", [*self.program, "generate", *words])
        picture = next((self.folder / "pictures").glob("*.png"))
        spread = min(ImageStat.Stat(Image.open(picture).convert("RGB")).stddev)
        return Finding(
            "generated", spread > FLAT_LEVELS, f"{picture.name}, {spread:.0f} levels of spread"
        )

    def step(self, free_gib: float, size: str = "sdxl") -> Iterator[Finding]:
        """Measure a step by the fastest plan that fits. Too little memory or time is no failure."""
        is_gpu = self.env != ON_CPU
        px = FULL_PX if is_gpu else CPU_PX
        half = self.precisions[-1] if is_gpu and len(self.precisions) > 1 else "bf16"
        config = TrainConfig(resolution=px, train_batch_size=1, rank=16, mixed_precision=half)
        needs = costs(config, BaseSize())
        listed = ", ".join(f"{name} {gib:.1f} GiB" for name, gib in needs.items())
        told = f"--memory at {px} px needs {listed}"
        plan = next((name for name in STEP_PLANS if needs[name] <= USABLE * free_gib), None)
        if plan is None:
            yield Finding("step", True, f"left out: {free_gib:.1f} GiB are free; {told}", needs)
            return
        words = ["--size", size, "--resolution", str(px), "--mixed_precision", half]
        words += ["--gradient_checkpointing"] if plan != "full" else []
        command = [sys.executable, "-m", "dreambooth_moslora.extras.lab.selftest", *words]
        try:
            found = json.loads(self.call("step", command, STEP_SEC).splitlines()[-1])
        except subprocess.TimeoutExpired:
            yield Finding(
                "step",
                True,
                f"left out: four steps take longer than {STEP_SEC} s here; {told}",
                needs,
            )
            return
        said = "{step_sec:.2f} s at {} px, the floor {floor_sec:.2f} s, peak {peak_gib:.1f} GiB ({}); {}"
        yield Finding("step", True, said.format(px, plan, told, **found), {**found, **needs})

    def run(self, name: str) -> run_folder.RunDir:
        return run_folder.RunDir(self.folder / name)

    def train(self, name: str, launcher: Sequence[str] = (), **changes) -> run_folder.RunDir:
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
        words = [
            word for key, value in (settings | changes).items() for word in (f"--{key}", value)
        ]
        self.call(name, [*(launcher or self.program), "train", *words])
        return self.run(name)

    def call(self, name: str, command: Sequence[object], timeout_sec: float | None = None) -> str:
        """Run a command; returns its output. Raises UserError with the last line of its error
        output when it fails."""
        words, env = list(map(str, command)), os.environ | self.env
        done = subprocess.run(
            words, env=env, capture_output=True, text=True, check=False, timeout=timeout_sec
        )
        (self.folder / f"{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["nothing was said"]
            raise UserError(f"{name}: exit code {done.returncode}: {lines[-1]}")
        return done.stdout


def losses(run: run_folder.RunDir) -> list[float]:
    """Of the steps that were made: a step that fp16 skips is made again, and its loss may be
    infinite."""
    return [
        event["loss"]
        for event in run.read_metrics()
        if event["type"] == "step" and not event.get("skipped")
    ]


def largest_difference(found: list[float], expected: list[float]) -> float:
    """Largest relative difference of two lists of losses; infinite when one is missing or not
    finite."""
    if len(found) != len(expected):
        return math.inf
    differences = [abs(one - other) / abs(other) for one, other in zip(found, expected)]
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
    lines += [
        f"| {found.name} | {'yes' if found.holds else '**no**'} | {found.said} |"
        for found in findings
    ]
    claims = [(CLAIMS[found.name], found.holds) for found in findings if found.name in CLAIMS]
    lines += [
        "",
        *(
            f"- {claim}: {'holds here' if holds else '**does not hold here**'}"
            for claim, holds in claims
        ),
    ]
    return "\n".join(lines) + "\n"


def as_json(facts: dict[str, str], findings: list[Finding]) -> str:
    return json.dumps({"machine": facts, "findings": [vars(found) for found in findings]}, indent=1)


if __name__ == "__main__":
    main()
