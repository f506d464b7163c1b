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
from dreambooth_moslora.errors import one_line

__all__ = ["ARMS", "Step", "main", "measure", "measure_or_say", "measured"]

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
WARM_UP = 3


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
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
        found = measure(arm, options)
    except RuntimeError as error:
        found = {"arm": arm, **told(options), "error": one_line(error)}
    print(json.dumps(found), flush=True)

    # The next arm has the memory for itself.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def told(options: argparse.Namespace) -> dict:
    """The options, but for the arms."""
    return {name: value for name, value in vars(options).items() if name != "arms"}


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    arms = "; ".join(f"{name}: {what}" for name, what in ARMS.items())
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
    from benchmarks.gpu_memory import estimated_total_gib
    from benchmarks.precision import half_accelerator

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = arm == "benchmarked"
    accelerator = half_accelerator()
    device, options.precision = accelerator.device, accelerator.mixed_precision
    step = floor(options, device) if arm == "floor" else trainer_step(arm, options, accelerator)
    found = measured(arm, step, options, device)
    if arm == "ours":
        found["estimate_gib"] = round(estimated_total_gib(run_config(options, "off")), 2)
    return found


def measured(
    arm: str,
    step: Step,
    options: argparse.Namespace,
    device: torch.device,
) -> dict:
    """Time the step, and say by which options."""
    for _ in range(WARM_UP):
        step()
    finish(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    runs = [timed(step, device) for _ in range(options.steps)]
    facts = {"arm": arm, **told(options)}
    facts["step_sec"] = round(median(whole for whole, _, _ in runs), 4)
    facts["host_sec"] = round(median(host for _, host, _ in runs), 4)
    if runs[-1][2]:
        facts["loss"], facts["grad_norm"] = runs[-1][2]
    return facts | (card_facts(step) if device.type == "cuda" else {})


def timed(step: Step, device: torch.device) -> tuple[float, float, tuple[float, float] | None]:
    """Seconds until the step is done, and until the program was free again; and what it gave."""
    start = time.perf_counter()
    found = step()
    host = time.perf_counter() - start
    finish(device)
    return time.perf_counter() - start, host, found


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def card_facts(step: Step) -> dict:
    """Memory of the steps so far, and the kernels of one more."""
    return {
        "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "kernels": kernels_of(step),
    }


def kernels_of(step: Step) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages())


def floor(options: argparse.Namespace, device: torch.device) -> Step:
    from dreambooth_moslora.extras.lab.full_step import floor_step, random_materials
    from dreambooth_moslora.plan.distributed import DTYPES

    materials = random_materials(options.size, options.resolution, DTYPES[options.precision])
    unet = materials.pipeline.unet.to(device).requires_grad_(False).train()
    if options.checkpointing:
        unet.enable_gradient_checkpointing()
    return floor_step(materials, run_config(options, "off"), device)


def trainer_step(arm: str, options: argparse.Namespace, accelerator) -> Step:
    from dreambooth_moslora.base.quantization import quantize
    from dreambooth_moslora.extras.lab.full_step import random_materials
    from dreambooth_moslora.method.fast_linear import disable_fast_path
    from dreambooth_moslora.plan.distributed import DTYPES
    from dreambooth_moslora.training.step import TrainStep

    dtype = DTYPES[options.precision]
    materials = random_materials(options.size, options.resolution, dtype)
    unet = materials.pipeline.unet.requires_grad_(False)
    if arm == "nf4":
        quantize(unet, "nf4", dtype, accelerator.device)
    unet.to(accelerator.device)
    if arm == "channels_last":  # before the adapters, which are laid as their layers are
        lay_convolutions(unet, torch.channels_last)
    config = run_config(options, "on" if arm == "compiled" else "off")
    train_step = TrainStep(config, materials, accelerator, max_train_steps=WARM_UP + options.steps)
    if arm == "peft":
        disable_fast_path(unet)

    def step() -> tuple[float, float]:
        found = train_step.update_adapter(train_step.accumulate_gradients())
        return found.total, found.grad_norm

    return step


def lay_convolutions(unet: torch.nn.Module, layout: torch.memory_format) -> None:
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
