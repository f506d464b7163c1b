"""Measures seconds and memory of a training step of full-size SDXL with random weights.

    python -m dreambooth_moslora.training.machine.step_measure

Prints one line of JSON: `floor_sec` (the frozen UNet's forward pass and the gradient of its input), `step_sec`
(the trainer's step, with the adapter's update), and `peak_gib` of the process, or of its tensors on a GPU. Both
times are of a second call, after one to warm up.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch

from dreambooth_moslora.base.random_unet import SIZES
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.process import keep_freed_memory, peak_memory_gib
from dreambooth_moslora.training.machine.random_materials import RandomMaterials, random_materials

__all__ = ["floor_step", "measure"]

GIB = 2**30


def measure(size: str, config: TrainConfig) -> dict[str, float]:
    """Measure a batch as `config` says, in bf16, on the device that accelerate chooses."""
    from accelerate import Accelerator

    from dreambooth_moslora.training.step.train_step import TrainStep

    accelerator = Accelerator(mixed_precision="bf16")
    materials = random_materials(size, config.resolution)
    unet = materials.pipeline.unet.requires_grad_(False).to(accelerator.device)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    found = {"floor_sec": second_of(floor_step(materials, config, accelerator.device), accelerator.device)}
    train_step = TrainStep(config, materials, accelerator, max_train_steps=10)

    def step() -> None:
        train_step.accumulate_gradients()
        train_step.update_adapter()

    found["step_sec"] = second_of(step, accelerator.device)
    is_gpu = accelerator.device.type == "cuda"
    return found | {"peak_gib": torch.cuda.max_memory_allocated() / GIB if is_gpu else peak_memory_gib()}


def floor_step(materials: RandomMaterials, config: TrainConfig, device: torch.device) -> Callable[[], None]:
    """One forward pass of the frozen UNet in training mode and its input's gradient: the lower bound of a step."""
    unet, batch = materials.pipeline.unet.train(), materials.batch_at(0, config.train_batch_size)
    words = materials.prompt_embeds(batch.prompts)
    embeds = words.embeds.to(device)
    added = {"text_embeds": words.pooled.to(device), "time_ids": batch.time_ids.to(device)}

    def step() -> None:
        noisy = torch.randn_like(batch.latents, device=device, dtype=materials.dtype).requires_grad_()
        unet(noisy, 500, embeds, added_cond_kwargs=added).sample.float().square().mean().backward()

    return step


def second_of(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of a second call of `step`; the first warms up."""
    step()
    start = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--size", choices=SIZES, default="sdxl")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()
    config = TrainConfig(
        instance_data_dir=".",
        instance_prompt="a photo of sks dog",
        resolution=args.resolution,
        rank=16,
        train_batch_size=1,
        gradient_checkpointing=args.gradient_checkpointing,
        mixed_precision="bf16",
        seed=0,
    )
    print(json.dumps(measure(args.size, config)))


if __name__ == "__main__":
    main()
