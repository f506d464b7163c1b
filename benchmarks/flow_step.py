"""Seconds and memory of one training step of a flow family on a GPU, with random weights.

    python -m benchmarks.flow_step --model Z-Image            # ours, recomputed, 1024 px
    python -m benchmarks.flow_step --model "FLUX.1 dev" --plan nf4 nf4_stream --arms ours peft
    python -m benchmarks.flow_step --model Qwen-Image --arms ours stateful compiled
    python -m benchmarks.flow_step --size small --resolution 64           # on a CPU: does it run

It downloads nothing: the configurations are those of the published models, one photo and one
prompt are random. It prints one line of JSON for each plan and arm, as `gpu_step` does.
"""

import argparse
import itertools
from dataclasses import replace

import diffusers
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from benchmarks.family_memory import MODELS, build_config, find_facts
from benchmarks.gpu_step import WARM_UP_STEPS, Step, measure_arm, measure_or_say
from benchmarks.peft_layers import restore_peft_layers
from benchmarks.precision import build_half_accelerator
from dreambooth_moslora.base.families import FAMILY_CLASSES
from dreambooth_moslora.base.quantization import quantize
from dreambooth_moslora.base.streaming import StreamedBlocks
from dreambooth_moslora.extras.lab.full_step import build_inputs, fill_weights, sample_noise
from dreambooth_moslora.plan.base_size import compute_base_size
from dreambooth_moslora.plan.distributed import PRECISION_DTYPES
from dreambooth_moslora.plan.memory import estimate_memory
from dreambooth_moslora.settings.family_facts import FamilyFacts
from dreambooth_moslora.settings.memory_presets import MEMORY_PLANS
from dreambooth_moslora.training.prepare import TrainInputs
from dreambooth_moslora.training.step import TrainStep

__all__ = ["ARMS", "SMALL", "main"]

ARMS = {
    "ours": "the trainer's own step",
    "peft": "the same, by PEFT's own layers",
    "compiled": "ours, with --compile on",
    "stateful": "ours, recomputed with the state of the random generator",
}
SMALL = {
    "FLUX.1 dev": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
    "FLUX.2 klein 4B": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
    "Z-Image": {"n_layers": 1, "n_refiner_layers": 1, "dim": 256, "n_heads": 2, "n_kv_heads": 2},
    "Qwen-Image": {"num_layers": 1, "num_attention_heads": 2},
    "Krea 2": {
        "num_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 256,
        "text_intermediate_size": 256,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
    },
}
"""What makes each model small enough for a CPU; its texts and latents stay as they are."""


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    for plan, arm in itertools.product(options.plan, options.arms):
        of_plan = argparse.Namespace(**vars(options) | {"plan": plan})
        measure_or_say(measure, arm, of_plan)


def measure(arm: str, options: argparse.Namespace) -> dict:
    """Build the arm and time its steps."""
    torch.manual_seed(0)
    accelerator = build_half_accelerator()
    options.precision = accelerator.mixed_precision
    step, estimate_gib = build_trainer_step(arm, options, accelerator)
    result = measure_arm(arm, step, options, accelerator.device)
    return result | {"estimate_gib": round(estimate_gib, 2)}


def build_parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    arms = "; ".join(f"{name}: {description}" for name, description in ARMS.items())
    options.add_argument("--model", choices=SMALL, default="Z-Image")
    options.add_argument("--arms", nargs="+", choices=ARMS, default=["ours"], help=arms)
    options.add_argument(
        "--plan", nargs="+", choices=MEMORY_PLANS, default=["recompute"], help="words of --memory"
    )
    options.add_argument("--size", choices=("full", "small"), default="full")
    options.add_argument("--resolution", type=int, default=1024)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--steps", type=int, default=5, help="steps that are timed")
    return options


def build_trainer_step(
    arm: str,
    options: argparse.Namespace,
    accelerator: Accelerator,
) -> tuple[Step, float]:
    """Build the trainer's step of one random photo with its update, by arm and plan. Returns it
    with the GiB that `--dry_run` estimates for it."""
    facts, dtype = find_facts(MODELS[options.model][0]), PRECISION_DTYPES[options.precision]
    config = replace(
        build_config(facts, options.resolution, options.rank, "full"),
        train_batch_size=options.batch,
        mixed_precision=options.precision,
        compile="on" if arm == "compiled" else "off",
        seed=0,
        **MEMORY_PLANS[options.plan],
    )

    # The denoiser, as the trainer lays it.
    device = accelerator.device
    denoiser = build_random_denoiser(options.model, facts, options.size, dtype, device)
    shapes = {name: list(weight.shape) for name, weight in denoiser.named_parameters()}
    size = compute_base_size(facts, {facts.denoiser: shapes}, facts.targets)
    quantize(denoiser, config.base_quantization, dtype)
    if config.stream_blocks:
        StreamedBlocks(denoiser, device)

    materials = build_random_inputs(options.model, facts, denoiser, options.resolution, dtype)

    steps = WARM_UP_STEPS + options.steps
    train_step = TrainStep(config, materials, accelerator, max_train_steps=steps)
    if arm == "peft":
        restore_peft_layers(denoiser)
        train_step.working_copies.layers.clear()
    if arm == "stateful":
        denoiser.enable_gradient_checkpointing()

    def step() -> tuple[float, float]:
        loss = train_step.update_adapter(train_step.accumulate_gradients())
        return loss.total, loss.grad_norm

    return step, estimate_memory(config, size, total_steps=steps).training_gib


def build_random_denoiser(
    model: str,
    facts: FamilyFacts,
    size: str,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """Filled on the device: billions of numbers are slow to draw and to move elsewhere."""
    kind, options = getattr(diffusers, facts.model), MODELS[model][1]
    little = kind(**options | SMALL[model])
    with torch.device("meta"):
        denoiser = kind(**options | SMALL[model]) if size == "small" else kind(**options)
    denoiser = denoiser.to(dtype).to_empty(device=device).requires_grad_(False).train()

    # Tables of places are computed as a part is built, and have no numbers on the meta device.
    for name, part in little.named_children():
        if not list(part.parameters()):
            setattr(denoiser, name, part.to(device))
    noise = sample_noise(dtype).to(device)
    for part in denoiser.modules():
        fill_weights(part, noise)
    return denoiser


def build_random_inputs(
    model: str,
    facts: FamilyFacts,
    denoiser: nn.Module,
    resolution_px: int,
    dtype: torch.dtype,
) -> TrainInputs:
    """Build the inputs of a run from one random photo and one random prompt."""
    _, _, (channels, px), text_tokens = MODELS[model]
    kind, scheduler = getattr(diffusers, facts.pipeline), FlowMatchEulerDiscreteScheduler()
    parts = dict.fromkeys(("vae", *facts.encoders, *map(get_tokenizer_name, facts.encoders)))
    pipeline = kind(**parts, transformer=denoiser, scheduler=scheduler)
    shapes = {name: rows[0].shape for name, rows in text_tokens().items() if rows is not None}
    text = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    side = resolution_px // px
    latents, family = torch.randn(channels, side, side), FAMILY_CLASSES[facts.name](facts)
    return build_inputs(pipeline, family, text, latents, resolution_px, dtype)


def get_tokenizer_name(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


if __name__ == "__main__":
    main()
