"""Seconds, memory and kernels of one training step on a GPU, with random weights and without a
download.

    python -m benchmarks.gpu_step                                # full-size SDXL, 1024 px, batch 1
    python -m benchmarks.gpu_step --arms ours peft --batch 2 --checkpointing
    python -m benchmarks.gpu_step --arms ours compiled benchmarked nf4
    python -m benchmarks.gpu_step --size small --resolution 64   # on a CPU: does it run at all

It prints one line of JSON for each arm, one after the other in this process, in bf16, or in fp16 on
a card without it. `host_sec` is how long the program takes to hand a step to the GPU: if it equals
`step_sec`, the GPU waits for the program. `reserved_gib` plus 0.5 for CUDA's context corresponds to
`estimate_gib` and to `total` in `benchmarks.gpu_memory`, plus workspaces and fragmentation. `loss`
and `grad_norm` are those of the last step: arms that compute the same agree in them.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.meta_count import GIB
from benchmarks.peft_layers import restore_peft_layers
from dreambooth_moslora.errors import format_error

__all__ = ["ARMS", "Step", "main", "measure", "measure_or_say", "measure_arm"]

Step = Callable[[], tuple[float, float] | None]
"""One step -> its loss and the norm of its gradient, where it has them."""

ARMS = {
    "floor": "the frozen UNet's forward and the gradient to its input",
    "ours": "the trainer's own step",
    "peft": "the same, by PEFT's own layers",
    "compiled": "ours, with --compile on",
    "channels_last": "ours, with convolutions in NHWC",
    "benchmarked": "ours, with cuDNN's own search for algorithms",
    "nf4": "ours, the base in 4 bit",
}
WARM_UP_STEPS = 3


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    for arm in options.arms:
        measure_or_say(measure, arm, options)


def measure_or_say(
    measure: Callable[[str, argparse.Namespace], dict],
    arm: str,
    options: argparse.Namespace,
) -> None:
    """Print what `measure` finds; for an arm that this card cannot do, its error, so that the
    others follow."""
    try:
        result = measure(arm, options)
    except RuntimeError as error:
        result = {"arm": arm, **get_options(options), "error": format_error(error)}
    print(json.dumps(result), flush=True)

    # The next arm has the memory for itself.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def get_options(options: argparse.Namespace) -> dict:
    """Return the options without the arms."""
    return {name: value for name, value in vars(options).items() if name != "arms"}


def build_parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    arms = "; ".join(f"{name}: {description}" for name, description in ARMS.items())
    options.add_argument(
        "--arms", nargs="+", choices=ARMS, default=["floor", "ours", "peft"], help=arms
    )
    options.add_argument("--size", default="sdxl", help=argparse.SUPPRESS)
    options.add_argument("--resolution", type=int, default=1024)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument(
        "--steps", type=int, default=10, help="steps that are timed; the median counts"
    )
    options.add_argument("--checkpointing", action="store_true")
    options.add_argument(
        "--prior", action="store_true", help="with the frozen base's own answer as the prior"
    )
    return options


def measure(arm: str, options: argparse.Namespace) -> dict:
    """Build the arm and time its steps."""
    from benchmarks.gpu_memory import estimate_total_gib
    from benchmarks.precision import build_half_accelerator

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = arm == "benchmarked"
    accelerator = build_half_accelerator()
    device, options.precision = accelerator.device, accelerator.mixed_precision
    step = (
        build_floor_step(options, device)
        if arm == "floor"
        else build_trainer_step(arm, options, accelerator)
    )
    result = measure_arm(arm, step, options, device)
    if arm == "ours":
        result["estimate_gib"] = round(estimate_total_gib(run_config(options, "off")), 2)
    return result


def measure_arm(
    arm: str,
    step: Step,
    options: argparse.Namespace,
    device: torch.device,
) -> dict:
    """Time the step, and say by which options."""
    for _ in range(WARM_UP_STEPS):
        step()
    finish(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    runs = [time_step(step, device) for _ in range(options.steps)]
    facts = {"arm": arm, **get_options(options)}
    facts["step_sec"] = round(median(whole for whole, _, _ in runs), 4)
    facts["host_sec"] = round(median(host for _, host, _ in runs), 4)
    if runs[-1][2]:
        facts["loss"], facts["grad_norm"] = runs[-1][2]
    return facts | (collect_card_facts(step) if device.type == "cuda" else {})


def time_step(step: Step, device: torch.device) -> tuple[float, float, tuple[float, float] | None]:
    """Seconds until the step is done, and until the program was free again; and what it gave."""
    start = time.perf_counter()
    losses = step()
    host = time.perf_counter() - start
    finish(device)
    return time.perf_counter() - start, host, losses


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def collect_card_facts(step: Step) -> dict:
    """Memory of the steps so far, and the kernels of one more."""
    return {
        "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "kernels": count_kernels(step),
    }


def count_kernels(step: Step) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages())


def build_floor_step(options: argparse.Namespace, device: torch.device) -> Step:
    from dreambooth_moslora.extras.lab.full_step import build_floor_step, build_random_inputs
    from dreambooth_moslora.plan.distributed import PRECISION_DTYPES

    materials = build_random_inputs(
        options.size, options.resolution, PRECISION_DTYPES[options.precision]
    )
    unet = materials.pipeline.unet.to(device).requires_grad_(False).train()
    if options.checkpointing:
        unet.enable_gradient_checkpointing()
    return build_floor_step(materials, run_config(options, "off"), device)


def build_trainer_step(arm: str, options: argparse.Namespace, accelerator) -> Step:
    from dreambooth_moslora.base.quantization import quantize
    from dreambooth_moslora.extras.lab.full_step import build_random_inputs
    from dreambooth_moslora.plan.distributed import PRECISION_DTYPES
    from dreambooth_moslora.training.step import TrainStep

    dtype = PRECISION_DTYPES[options.precision]
    materials = build_random_inputs(options.size, options.resolution, dtype)
    unet = materials.pipeline.unet.requires_grad_(False)
    if arm == "nf4":
        quantize(unet, "nf4", dtype, accelerator.device)
    unet.to(accelerator.device)
    if arm == "channels_last":  # before the adapters, which are laid as their layers are
        set_convolution_layout(unet, torch.channels_last)
    config = run_config(options, "on" if arm == "compiled" else "off")
    train_step = TrainStep(
        config, materials, accelerator, max_train_steps=WARM_UP_STEPS + options.steps
    )
    if arm == "peft":
        restore_peft_layers(unet)
        train_step.working_copies.layers.clear()

    def step() -> tuple[float, float]:
        loss = train_step.update_adapter(train_step.accumulate_gradients())
        return loss.total, loss.grad_norm

    return step


def set_convolution_layout(unet: torch.nn.Module, layout: torch.memory_format) -> None:
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=layout)


def run_config(options: argparse.Namespace, compiled: str):
    from dreambooth_moslora.settings.train_config import TrainConfig

    prior = {
        "with_prior_preservation": True,
        "prior": "adapter_off",
        "class_prompt": "a photo of a dog",
    }
    return TrainConfig(
        instance_data_dir=".",
        instance_prompt="a photo of sks dog",
        resolution=options.resolution,
        rank=options.rank,
        train_batch_size=options.batch,
        gradient_checkpointing=options.checkpointing,
        mixed_precision=options.precision,
        seed=0,
        compile=compiled,
        **(prior if options.prior else {}),
    )


if __name__ == "__main__":
    main()
