"""PEFT's comparison of methods that learn a subject (its `method_comparison/image-gen`), on any
base, with MoSLoRA among them.

    python -m benchmarks.peft_image --seeds 0 1 2 3      # the embedded base, renders of a toy
    python -m benchmarks.peft_image --base black-forest-labs/FLUX.2-klein-base-4B \\
        --photos PHOTOS --params default_training_params.json

The protocol is PEFT's. Some photos are held out. Each method trains the same steps at one rate on
the others. `similarity` is DINOv2's cosine between a picture of a held-out photo's caption and that
photo; `drift` is 1 - the cosine between pictures with and without the adapter, from the same noise,
of prompts that have nothing to do with the subject. A file is written for each method and seed,
with the fields of PEFT's own results. `--params` is PEFT's file of settings and prompts; its
prompts belong to the photos in the order of their names.

What differs from PEFT's `run.py`: the step is this program's, so noise and the order of photos are
drawn by its seeds. Noise levels are those of diffusers' script for the family, from which PEFT's
own come.
A method and seed whose file is there is not run again.
"""

import argparse
import json
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import LoKrConfig, LoraConfig, OFTConfig, PeftConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dreambooth_moslora.disk.atomic import atomic_write
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.evaluation.metrics import Encoders, bootstrap_mean, load_encoders
from dreambooth_moslora.generation.sampling import Sampler, SampleRequest
from dreambooth_moslora.method.fast_linear import WorkingCopies
from dreambooth_moslora.method.moslora import cast_adapter_dtype, exact_config
from dreambooth_moslora.photos.folder import usable_photos
from dreambooth_moslora.photos.photo_file import open_image
from dreambooth_moslora.plan.distributed import make_accelerator
from dreambooth_moslora.plan.plan import make_plan
from dreambooth_moslora.settings.toy_bases import is_toy
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training.adapters import target_paths
from dreambooth_moslora.training.prepare import TrainInputs, prepare
from dreambooth_moslora.training.reporter import Reporter, RunContext
from dreambooth_moslora.training.step import TrainStep

__all__ = ["ARMS", "PARAMS", "Pictures", "main", "split", "table"]

RANK = 32
PARAMS: dict[str, Any] = {
    "model_id": "toy",
    "dataset_id": "renders of a toy",
    "dataset_split": "train",
    "dtype": "float32",
    "resolution": 128,
    "batch_size": 2,
    "batch_size_eval": 1,
    "repeats": 1000,
    "max_steps": 750,
    "eval_steps": 250,
    "compile": False,
    "use_gc": False,
    "seed": 0,
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 1e-3, "weight_decay": 1e-4},
    "lr_scheduler": None,
    "use_amp": False,
    "autocast_adapter_dtype": True,
    "instance_prompts": [],
    "image_column": "image",
    "valid_size": 2,
    "test_size": 4,
    "num_inference_steps": 20,
    "guidance_scale": 2.5,
    "max_sequence_length": 77,
    "text_encoder_out_layers": [],
    "weighting_scheme": "none",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
    "dino_model_id": "toy-dino",
    "dino_image_size": 224,
    "sample_image_prompts": [],
    "drift_image_prompts": [
        "a photo of a rocket",
        "a photo of a white rocket in a forest",
        "a photo of a red duck in the snow",
        "a photo of a green bear on grass",
        "a photo of a yellow mug on a purple rug",
        "a photo of a blue train in a forest",
        "a photo of a pink robot on a city street",
        "a photo of a grey house on a checkered floor",
        "a photo of a purple cactus in the desert",
        "a photo of a teal dinosaur on the beach",
    ],
}
"""The fields of PEFT's `TrainConfig`, with the values for the embedded base. The rate is the one of
its quick start, as 750 steps at PEFT's 1e-4 teach so small a model nothing."""
PHOTOS = 20
# PEFT draws its test pictures three times, each time from other noise.
REPEATS = 3
# As in PEFT's run.py, so that no picture has the noise of training.
EVAL_SEED = 100_000
DRIFT_SEED = 100_000_000


@dataclass(frozen=True)
class Pictures:
    """Photos with a caption each."""

    files: list[Path]
    prompts: list[str]

    def part(self, numbers: Sequence[int]) -> "Pictures":
        return Pictures([self.files[n] for n in numbers], [self.prompts[n] for n in numbers])

    @property
    def images(self) -> list[Image.Image]:
        return [open_image(file).convert("RGB") for file in self.files]


def split(pictures: Pictures, valid: int, test: int) -> tuple[Pictures, Pictures, Pictures]:
    """Those to train on, to validate and to test: shuffled as PEFT does, by numpy's seed 0."""
    order = np.arange(len(pictures.files))
    np.random.RandomState(0).shuffle(order)
    count = len(order) - valid - test
    parts = (order[:count], order[count : count + valid], order[count + valid :])
    return tuple(pictures.part(part.tolist()) for part in parts)


def rendered(folder: Path, subject: str) -> Pictures:
    """Photos of a sample subject in as many places, rendered into `folder`."""
    from toybox.make_subjects import PHOTO_PX, load
    from toybox.render import render
    from toybox.world import PLACES, sample_scene

    toy, rng = load(subject), random.Random("peft_image")
    places = [*rng.sample(PLACES, len(PLACES)), *rng.sample(PLACES, len(PLACES))][:PHOTOS]
    scenes = [sample_scene(rng, toy.toy, place, held_out=None) for place in places]
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, picture in enumerate(render(scenes, PHOTO_PX)):
        files.append(folder / f"{number:02d}.png")
        Image.fromarray(picture.numpy()).save(files[-1])
    prompts = [f"a photo of a {toy.token} {toy.class_word} {place}" for place in places]
    return Pictures(files, prompts)


def given(folder: Path, prompts: list[str]) -> Pictures:
    """A person's photos, with these prompts or those of the text files beside them."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".png"))
    if not prompts:
        prompts = [file.with_suffix(".txt").read_text("utf-8").splitlines()[0] for file in files]
    if len(files) != len(prompts):
        raise SystemExit(f"{folder} has {len(files)} photos, and there are {len(prompts)} prompts")
    return Pictures(files, prompts)


# The methods. Each gets the layers, and returns PEFT's config for exactly these.
def lora(layers: dict[str, nn.Linear]) -> PeftConfig:
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(layers))


def moslora(layers: dict[str, nn.Linear]) -> PeftConfig:
    """In each layer the highest rank that has no more numbers than LoRA there, the mixer
    included."""
    ranks = {}
    for path, layer in layers.items():
        width = layer.in_features + layer.out_features
        rank = RANK
        while rank * (width + rank) > RANK * width:
            rank -= 1
        ranks[path] = rank
    usual = max(ranks.values())
    return exact_config(ranks, ranks, usual, usual, mixer="orthogonal")


def lokr(layers: dict[str, nn.Linear]) -> PeftConfig:
    return LoKrConfig(r=RANK, alpha=RANK, target_modules=list(layers))


def oft(layers: dict[str, nn.Linear]) -> PeftConfig:
    """Blocks of 32, by Cayley-Neumann, as in PEFT's experiment."""
    return OFTConfig(r=0, oft_block_size=32, use_cayley_neumann=True, target_modules=list(layers))


ARMS: dict[str, Callable[[dict[str, nn.Linear]], PeftConfig]] = {
    "lora": lora,
    "moslora": moslora,
    "lokr": lokr,
    "oft": oft,
}


class PeftStep(TrainStep):
    """The trainer's step with any adapter of PEFT, computed by PEFT's own layers, and AdamW."""

    def __init__(
        self,
        adapter: PeftConfig,
        config: TrainConfig,
        inputs: TrainInputs,
        accelerator: Accelerator,
        optimizer: dict[str, float],
    ):
        self.config = config
        self.inputs = inputs
        self.accelerator = accelerator
        self.device = accelerator.device
        self.step = 0
        self.schedule = inputs.schedule.to(self.device)
        self.class_prompts = [subject.class_prompt for subject in config.each_subject]
        self.compiled = []
        self.copies = WorkingCopies()

        # PEFT freezes the base. The adapter is in fp32, as PEFT casts it for its own trainings.
        denoiser = inputs.denoiser
        torch.manual_seed(config.seed)
        inject_adapter_in_model(adapter, denoiser)
        cast_adapter_dtype(denoiser, "default")
        self.components = {inputs.family.facts.denoiser: denoiser}
        self.parameters = [weight for weight in denoiser.parameters() if weight.requires_grad]
        self.optimizer = accelerator.prepare(torch.optim.AdamW(self.parameters, **optimizer))
        self.lr_schedule = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)


def config_of(params: dict[str, Any], folder: Path, out: Path, seed: int) -> TrainConfig:
    """The trainer's settings for PEFT's. The rank and the rate of the adapter are the arm's."""
    half = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    return TrainConfig(
        pretrained_model_name_or_path=params["model_id"],
        instance_data_dir=str(folder),
        output_dir=str(out),
        instance_prompt="a photo",
        instance_prompt_share=0.0,
        resolution=params["resolution"],
        center_crop=True,
        random_flip=False,
        with_prior_preservation=False,
        train_batch_size=params["batch_size"],
        max_train_steps=params["max_steps"],
        max_grad_norm=params["grad_norm_clip"],
        gradient_checkpointing=params["use_gc"],
        mixed_precision=half[params["dtype"]],
        num_validation_images=1,  # or the VAE would be let go
        report_to="none",
        seed=seed,
    )


@dataclass
class Judge:
    """Draws, and compares what was drawn."""

    sampler: Sampler
    encoders: Encoders
    seed: int

    def drawn(self, prompts: Sequence[str], seed: int) -> torch.Tensor:
        """DINO's unit vectors (N, D) of a picture of each prompt."""
        requests = [SampleRequest(prompt, seed + n) for n, prompt in enumerate(prompts)]
        return self.encoders.dino_images(list(self.sampler(requests)))

    def similarity(self, pictures: Pictures, repeats: int = 1) -> float:
        """The mean cosine between each photo and a picture of its caption."""
        photos = self.encoders.dino_images(pictures.images)
        found = []
        for repeat in range(repeats):
            seed = self.seed + EVAL_SEED + repeat * len(pictures.prompts)
            found.append((self.drawn(pictures.prompts, seed) * photos).sum(1).mean())
        return float(torch.stack(found).mean())

    def unrelated(self, prompts: Sequence[str]) -> torch.Tensor:
        """DINO's vectors (N, D) of prompts that have nothing to do with the subject."""
        return self.drawn(prompts, self.seed + DRIFT_SEED)


def run(arm: str, pictures: Pictures, params: dict[str, Any], work: Path) -> dict[str, Any]:
    """Train one method with one seed; returns the fields of PEFT's results."""
    began, created = time.perf_counter(), datetime.now(UTC).replace(microsecond=0)
    training, valid, test = split(pictures, params["valid_size"], params["test_size"])
    inputs, context, config = prepared(training, [*valid.prompts, *test.prompts], params, work)
    sampler = Sampler(
        pipeline=inputs.pipeline,
        embed=inputs.prompt_embeds,
        resolution_px=params["resolution"],
        device=context.accelerator.device,
        inference_steps=params["num_inference_steps"],
        guidance_scale=params["guidance_scale"],
    )
    encoders = load_encoders(
        params["model_id"],
        dino="" if is_toy(params["model_id"]) else params["dino_model_id"],
        device=context.accelerator.device,
    )
    judge = Judge(sampler, encoders, params["seed"])

    # What the base draws, before it gets an adapter.
    of_base = judge.unrelated(params["drift_image_prompts"])

    # The layers that the family's LoRA adapts, each method in the same ones.
    denoiser = inputs.denoiser
    total = sum(weight.numel() for weight in denoiser.parameters())
    paths = target_paths(config, inputs.family.facts.denoiser, denoiser)
    adapter = ARMS[arm]({path: denoiser.get_submodule(path) for path in paths})
    step = PeftStep(adapter, config, inputs, context.accelerator, params["optimizer_kwargs"])
    metrics, seconds = trained(step, judge, valid, params)

    # The end: the test, the drift, and the size of the file.
    drawn = judge.unrelated(params["drift_image_prompts"])
    metrics[-1] |= {
        "test dino_similarity": judge.similarity(test, REPEATS),
        "drift": 1 - float((drawn * of_base).sum(1).mean()),
    }
    own = sum(weight.numel() for weight in step.parameters)
    memory = peak_bytes(context.accelerator.device)
    return {
        "run_info": {
            "created_at": created.isoformat(),
            "total_time": time.perf_counter() - began,
            "experiment_name": f"{arm}/{params['model_id'].split('/')[-1]}-seed{params['seed']}",
            "peft_branch": "main",
            "train_config": params | {"instance_prompts": pictures.prompts},
            "peft_config": plain(adapter),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": memory,
            "accelerator_memory_max": memory,
            "accelerator_memory_reserved_99th": memory,
            "train_time": seconds,
            "file_size": file_size(denoiser),
            "num_trainable_params": own,
            "num_total_params": total + own,
            "status": "success",
            "metrics": metrics,
        },
        "meta_info": about_this_machine(),
    }


def prepared(
    training: Pictures, asked: list[str], params: dict[str, Any], work: Path
) -> tuple[TrainInputs, RunContext, TrainConfig]:
    """What the trainer prepares for these photos, whose captions lie beside them. The prompts that
    will be drawn are encoded too."""
    folder = work / "photos"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file, prompt in zip(training.files, training.prompts, strict=True):
        shutil.copy(file, folder)
        (folder / file.name).with_suffix(".txt").write_text(prompt, encoding="utf-8")

    plan = make_plan(config_of(params, folder, work / "run", params["seed"]))
    run_dir = RunDir(plan.config.output_dir)
    accelerator = make_accelerator(plan.config, run_dir)
    reporter = Reporter(run_dir, accelerator, None)
    context = RunContext(run_dir, accelerator, reporter, should_stop=lambda: False)
    inputs = prepare(
        plan.config,
        plan.base,
        context,
        usable_photos(plan.photo_report),
        sample_count=params["max_steps"] * params["batch_size"],
        prompts=[*asked, *params["drift_image_prompts"]],
    )
    return inputs, context, plan.config


def trained(
    step: PeftStep, judge: Judge, valid: Pictures, params: dict[str, Any]
) -> tuple[list[dict[str, Any]], float]:
    """Take all steps; returns the rows of `metrics`, and the seconds without validation."""
    rows, losses, seconds, began = [], [], 0.0, time.perf_counter()
    every, size = params["eval_steps"], params["batch_size"]
    for number in range(1, params["max_steps"] + 1):
        losses.append(step.update_adapter(step.accumulate_gradients()).total)
        if number % every and number != params["max_steps"]:
            continue

        # A row at each validation; the last step's has the test instead.
        lasted = time.perf_counter() - began
        seconds += lasted
        row = {
            "step": number,
            "train loss": float(np.mean(losses[-every:])),
            "train samples": number * size,
            "train time": lasted,
        }
        if number != params["max_steps"]:
            row["valid dino_similarity"] = judge.similarity(valid)
        print(json.dumps(row), flush=True)
        rows.append(row)
        began = time.perf_counter()
    return rows, seconds


def file_size(denoiser: nn.Module) -> int:
    """Bytes of the adapter as PEFT saves it."""
    tensors = {}
    for name, tensor in get_peft_model_state_dict(denoiser).items():
        tensors[name] = tensor.detach().cpu().contiguous()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter_model.safetensors"
        save_file(tensors, file)
        return file.stat().st_size


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def plain(config: PeftConfig) -> dict[str, Any]:
    """A config as JSON has it: its sets as lists, its enums as words."""
    return json.loads(json.dumps(config.to_dict(), default=_word))


def _word(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))


def about_this_machine() -> dict[str, Any]:
    """Versions and the machine, under PEFT's names."""
    packages: dict[str, str | None] = {}
    for name in ("transformers", "peft", "datasets", "diffusers", "torch"):
        try:
            packages[f"{name}-version"] = version(name)
        except PackageNotFoundError:
            packages[f"{name}-version"] = None
        packages[f"{name}-commit-hash"] = None
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return {
        "model_info": None,
        "dataset_info": None,
        "package_info": packages,
        "system_info": {
            "system": platform.system(),
            "release": platform.release(),
            "version": platform.version(),
            "machine": platform.machine(),
            "processor": platform.processor(),
            "accelerator": card,
        },
        "pytorch_info": torch.__config__.show(),
    }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """A line for each method: its numbers, similarity and drift over the seeds with their
    intervals, and how they differ from LoRA's, seed by seed."""
    lines = [
        "| method | numbers | similarity | drift | similarity − LoRA's | drift − LoRA's |",
        "|---|---|---|---|---|---|",
    ]
    scores: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for arm, found in results.items():
        last = [one["train_info"]["metrics"][-1] for one in found]
        scores[arm] = (
            np.array([row["test dino_similarity"] for row in last]),
            np.array([row["drift"] for row in last]),
        )
    for arm, found in results.items():
        cells = [arm, f"{found[0]['train_info']['num_trainable_params']:,}"]
        cells += [str(bootstrap_mean(values)) for values in scores[arm]]
        if arm == "lora" or "lora" not in scores:
            cells += ["", ""]
        else:
            for own, plain_lora in zip(scores[arm], scores["lora"], strict=True):
                cells.append(f"{bootstrap_mean(own - plain_lora):+}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    params = dict(PARAMS)
    if options.params:
        params |= json.loads(options.params.read_text("utf-8"))
    if options.base:
        params["model_id"] = options.base
    if options.lr is not None:
        params["optimizer_kwargs"] = params["optimizer_kwargs"] | {"lr": options.lr}
    if options.steps is not None:
        params["max_steps"] = options.steps

    # The photos: a person's, or renders.
    if options.photos:
        pictures = given(options.photos, params["instance_prompts"])
        params["dataset_id"] = options.photos.name
    else:
        pictures = rendered(options.out / "renders", options.subject)

    # One file for each method and seed.
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    for seed in options.seeds:
        for arm in options.arms:
            file = options.out / "results" / f"{arm}--seed{seed}.json"
            if not file.is_file():
                print(f"{arm}, seed {seed}", flush=True)
                found = run(arm, pictures, params | {"seed": seed}, options.out / "work")
                file.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(file, json.dumps(found, indent=2).encode())
            results[arm].append(json.loads(file.read_text("utf-8")))
    print(table(results))


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--base", help="a folder or an id of the hub; default: toy")
    options.add_argument("--photos", type=Path, help="default: twenty renders of --subject")
    options.add_argument("--subject", default="rocket", help="a sample subject")
    options.add_argument("--params", type=Path, help="PEFT's default_training_params.json")
    options.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--steps", type=int, help="instead of max_steps")
    options.add_argument("--lr", type=float, help="instead of optimizer_kwargs' lr")
    options.add_argument("--out", type=Path, default=Path("runs/peft_image"))
    return options


if __name__ == "__main__":
    main()
