"""Build the arms of `train_step`, by the table that says which arms each is compared with."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

__all__ = ["ARMS", "Arm"]

Step = Callable[[], tuple[float, float]]  # -> (loss, gradient norm)


@dataclass(frozen=True)
class Arm:
    """`build(size, resolution_px, rank)` returns the step. `against` names the arms to divide
    by."""

    build: Callable[[str, int, int], Step]
    against: tuple[str, ...] = field(default=())
    slow: bool = False


def build_floor_step(size: str, resolution_px: int, rank: int) -> Step:
    """Return the frozen UNet's forward pass with its input's gradient, with the same malloc: the
    lower bound of a step."""
    from dreambooth_moslora.disk.processes import keep_freed_memory

    keep_freed_memory()
    import torch

    from dreambooth_moslora.extras.lab.full_step import build_random_inputs

    materials = build_random_inputs(size, resolution_px)
    unet, batch = (
        materials.pipeline.unet.requires_grad_(False).train(),
        materials.dataloader.load_batch([0]),
    )
    latents, text = (
        batch.latents.to(materials.dtype),
        materials.family.collate(materials.text_cache(batch.prompts)),
    )

    def step() -> tuple[float, float]:
        noisy = torch.randn_like(latents).requires_grad_()
        output = materials.family.predict(
            unet, noisy, torch.randint(0, 1000, (1,)), **batch.photo_inputs, **text
        )
        loss = output.float().square().mean()
        loss.backward()
        return loss.item(), noisy.grad.float().norm().item()

    return step


def build_trainer_step(
    size: str, resolution_px: int, rank: int, *, checkpointing: bool = False
) -> Step:
    """Return the trainer's step (`training.step.TrainStep`) on a random UNet with random inputs."""
    from benchmarks.precision import build_bf16_accelerator
    from dreambooth_moslora.disk.processes import keep_freed_memory
    from dreambooth_moslora.extras.lab.full_step import build_random_inputs
    from dreambooth_moslora.settings.train_config import TrainConfig
    from dreambooth_moslora.training.step import TrainStep

    keep_freed_memory()
    config = TrainConfig(
        instance_data_dir=".",
        instance_prompt="a photo of sks dog",
        resolution=resolution_px,
        rank=rank,
        train_batch_size=1,
        gradient_checkpointing=checkpointing,
        seed=0,
    )
    train_step = TrainStep(
        config,
        build_random_inputs(size, resolution_px),
        build_bf16_accelerator(),
        max_train_steps=100,
    )

    def step() -> tuple[float, float]:
        loss = train_step.update_adapter(train_step.accumulate_gradients())
        return loss.total, loss.grad_norm

    return step


def build_diffusers_step(
    size: str, resolution_px: int, rank: int, *, checkpointing: bool = True, fp32: bool = False
) -> Step:
    from benchmarks.diffusers_style_loop import build_diffusers_style_step

    return build_diffusers_style_step(size, resolution_px, rank, checkpointing, fp32)


ARMS: dict[str, Arm] = {
    "floor": Arm(build_floor_step),
    "ours": Arm(
        build_trainer_step,
        (
            "floor",
            "diffusers",
            "diffusers-fp32",
            "diffusers-checkpointing",
            "diffusers-fp32-checkpointing",
        ),
    ),
    "ours-checkpointing": Arm(
        partial(build_trainer_step, checkpointing=True),
        ("diffusers-checkpointing", "diffusers-fp32-checkpointing"),
    ),
    "diffusers": Arm(partial(build_diffusers_step, checkpointing=False), slow=True),
    "diffusers-fp32": Arm(partial(build_diffusers_step, checkpointing=False, fp32=True), slow=True),
    "diffusers-checkpointing": Arm(build_diffusers_step, slow=True),
    "diffusers-fp32-checkpointing": Arm(partial(build_diffusers_step, fp32=True), slow=True),
}
