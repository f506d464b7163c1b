"""GPU memory of a training step of full-size SDXL, counted on the meta device and compared with the
estimate.

    python -m benchmarks.gpu_memory    # floor, ours by plan, PEFT's own layers; a minute
    python -m benchmarks.gpu_memory --resolutions 512 1024 --ranks 16 128 --batches 1 4

It needs no GPU and no weights. GiB of tensors; a step ends with the adapters' gradients. `total`
adds weights, fp32 adapters, Adam, and 0.5 for CUDA itself. Kernels are dispatched operations
without views. `gpu_step` measures an actual card.
"""

import argparse
import gc
import itertools
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.meta_count import GIB, Count, Counter, count_bytes, patch_attention
from benchmarks.sdxl_structure import build_sdxl_unet
from dreambooth_moslora.settings.memory_presets import MEMORY_PLANS
from dreambooth_moslora.settings.train_config import TrainConfig

__all__ = [
    "build_adapted_unet",
    "count",
    "compute_total_gib",
    "estimate_total_gib",
    "main",
    "run_config",
]

TEXT_WIDTH, POOLED_WIDTH, TOKENS = 2048, 1280, 77
PROMPT = "a photo of sks dog"
DENSE_PLANS = [name for name, plan in MEMORY_PLANS.items() if "base_quantization" not in plan]


def run_config(
    resolution: int = 1024, rank: int = 16, batch: int = 1, plan: str = "full"
) -> TrainConfig:
    """Return the settings of a run by a plan of `--memory`."""
    return TrainConfig(
        instance_data_dir=".",
        instance_prompt=PROMPT,
        resolution=resolution,
        rank=rank,
        train_batch_size=batch,
        mixed_precision="bf16",
        num_validation_images=0,
        seed=0,
        **MEMORY_PLANS[plan],
    )


def build_adapted_unet(
    config: TrainConfig, *, fast: bool = True, unet: nn.Module | None = None
) -> nn.Module:
    """SDXL's UNet in bf16, or a given one, with the trainer's own adapters, on the meta device.

    `fast` False: PEFT's own layers.
    """
    from benchmarks.peft_layers import restore_peft_layers
    from dreambooth_moslora.training.adapters import add_adapters

    unet = unet or build_sdxl_unet().to(torch.bfloat16).requires_grad_(False).train()
    with torch.device("meta"):
        add_adapters(config, {"unet": unet})
    if not fast:
        restore_peft_layers(unet)
    return unet


def count(config: TrainConfig, unet: nn.Module) -> Count:
    """Count one step of one micro-batch: copies of the adapter, forward, backward, its gradients;
    without the optimizer."""
    from dreambooth_moslora.method.fast_linear import WorkingCopies

    batch, side = config.train_batch_size, config.resolution // 8
    trained = [weight for weight in unet.parameters() if weight.requires_grad]
    copies = WorkingCopies(unet)
    text = create_empty(batch, TOKENS, TEXT_WIDTH)
    noisy = create_empty(batch, 4, side, side).requires_grad_(not trained)
    added = {"text_embeds": create_empty(batch, POOLED_WIDTH), "time_ids": create_empty(batch, 6)}
    with Counter() as counter, patch_attention(), copies.attach_copies() as step:
        output = unet(noisy, create_empty(batch), text, added_cond_kwargs=added).sample
        loss = output.float().square().mean()
        live_bytes = counter.live
        loss.backward()
        step.collect()
    unet.zero_grad(set_to_none=True)
    return Count(live_bytes / GIB, counter.peak / GIB, counter.kernels)


def create_empty(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta", dtype=torch.bfloat16)


def compute_total_gib(unet: nn.Module, counted: Count) -> float:
    """Weights, Adam's two moments of the adapters, the step with its gradients, CUDA's context;
    GiB."""
    from dreambooth_moslora.base.devices import CONTEXT_GIB

    trained = sum(weight.numel() * 4 for weight in unet.parameters() if weight.requires_grad)
    return (count_bytes(unet) + 2 * trained) / GIB + counted.peak_gib + CONTEXT_GIB


def estimate_total_gib(config: TrainConfig) -> float:
    from dreambooth_moslora.plan.base_size import BaseSize
    from dreambooth_moslora.plan.memory import estimate_memory

    return estimate_memory(config, BaseSize(), total_steps=100).training_gib


def build_floor_unet(config: TrainConfig) -> nn.Module:
    """Build the frozen UNet without an adapter: the lower bound for a gradient of its input."""
    return build_sdxl_unet().to(torch.bfloat16).requires_grad_(False).train()


def print_row(
    name: str,
    config: TrainConfig,
    build: Callable[[TrainConfig], nn.Module],
    *,
    estimated: bool = True,
) -> float:
    """Print one line; returns |estimate / count - 1|, 0 without an estimate."""
    gc.collect()
    unet = build(config)
    counted = count(config, unet)
    total = compute_total_gib(unet, counted)
    line = (
        f"{name:44} {counted.kept_gib:6.2f} {counted.peak_gib:6.2f} {counted.kernels:8,} "
        f"{total:7.2f}"
    )
    if not estimated:
        print(line, flush=True)
        return 0.0
    estimate_gib = estimate_total_gib(config)
    print(f"{line} {estimate_gib:9.2f} {estimate_gib / total - 1:+10.1%}", flush=True)
    return abs(estimate_gib / total - 1)


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--resolutions", nargs="+", type=int, default=[1024], metavar="PX")
    options.add_argument("--ranks", nargs="+", type=int, default=[16], metavar="R")
    options.add_argument("--batches", nargs="+", type=int, default=[1], metavar="N")
    options = options.parse_args(arguments)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    print(
        f"{'SDXL, bf16':44} {'kept':>6} {'peak':>6} {'kernels':>8} {'total':>7} {'estimate':>9} "
        f"{'deviation':>10}"
    )
    first = run_config(options.resolutions[0], options.ranks[0], options.batches[0])
    print_row("floor: frozen, no adapter", first, build_floor_unet, estimated=False)
    print_row(
        "PEFT's own layers",
        first,
        lambda config: build_adapted_unet(config, fast=False),
        estimated=False,
    )
    deviations = []
    for px, rank, batch in itertools.product(options.resolutions, options.ranks, options.batches):
        for plan in DENSE_PLANS:
            name = f"{px} px, rank {rank}, batch {batch}, {plan}"
            deviations.append(
                print_row(name, run_config(px, rank, batch, plan), build_adapted_unet)
            )
    print(f"largest deviation of the estimate: {max(deviations):.1%}")


if __name__ == "__main__":
    main()
