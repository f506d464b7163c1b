"""Run a step of SDXL at full size with random weights, and its lower bound; nothing is downloaded.

The random UNet is one random megabyte repeated, scaled by 1/sqrt(fan-in), so that activations
neither grow nor vanish.

    python -m dreambooth_moslora.extras.lab.full_step

measures one step, and prints one line of JSON: `floor_sec` (the frozen UNet's forward pass and the
gradient of its input), `step_sec` (the trainer's step, with the update), and `peak_gib` of the
process, or of a GPU's tensors.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from dreambooth_moslora.base import devices, families, load
from dreambooth_moslora.disk import processes
from dreambooth_moslora.plan.distributed import PRECISION_DTYPES
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import dataset, noise_schedule, prepare
from dreambooth_moslora.training.step import TrainStep

WIDTHS = {"sdxl": (768, 1280), "small": (32, 64)}
"""Size of the UNet -> widths of its two texts. "sdxl" has 2.57 billion parameters, "small" the same
topology with a fortieth of the width."""


SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "cross_attention_dim": 2048,
}
"""The UNet of stabilityai/stable-diffusion-xl-base-1.0."""
SMALL = {
    "block_out_channels": (32, 64, 64),
    "attention_head_dim": (1, 2, 2),
    "transformer_layers_per_block": (1, 1, 2),
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 256,
    "cross_attention_dim": 96,
}
"""What differs in the small one."""


def build_random_unet(size: str, dtype: torch.dtype = torch.bfloat16) -> UNet2DConditionModel:
    """Build the UNet with random weights. `size` is one of WIDTHS."""
    options = SDXL if size == "sdxl" else SDXL | SMALL
    return build_random_module(lambda: UNet2DConditionModel(**options), dtype)


def build_random_module(
    build: Callable[[], torch.nn.Module], dtype: torch.dtype
) -> torch.nn.Module:
    """Build on the meta device, then fill: the modules' own initialisation of billions of numbers
    takes minutes."""
    with torch.device("meta"):
        module = torch.nn.Module.to(build(), dtype)
    module.to_empty(device="cpu")
    noise = sample_noise(dtype)
    for part in module.modules():
        fill_weights(part, noise)
    return module.eval()


def sample_noise(dtype: torch.dtype) -> torch.Tensor:
    """Sample the numbers that `fill_weights` repeats. Their count is odd, so that no two rows of a
    matrix are equal."""
    return torch.randn(2**20 + 1, generator=torch.Generator().manual_seed(0)).to(dtype)


@torch.no_grad()
def fill_weights(module: torch.nn.Module, noise: torch.Tensor) -> None:
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


def build_random_inputs(
    size: str, resolution_px: int, dtype: torch.dtype = torch.bfloat16
) -> prepare.TrainInputs:
    """Build the inputs of a run from a random UNet and one random photo and prompt."""
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
        unet=build_random_unet(size, dtype),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    )
    side = resolution_px // 8
    return build_inputs(
        pipeline,
        load.SDXL_FAMILY,
        text,
        latents=torch.randn(4, side, side),
        resolution_px=resolution_px,
        dtype=dtype,
    )


@dataclass(frozen=True)
class RepeatedSample:
    """Dataset that has one sample at every index."""

    sample: tuple[dataset.EncodedCrop, str]

    def __getitem__(self, index: int) -> tuple[dataset.EncodedCrop, str]:
        return self.sample

    def get_subject(self, index: int) -> int:
        return 0


def build_inputs(
    pipeline: DiffusionPipeline,
    family: families.Family,
    text: families.TextEmbedding,
    latents: torch.Tensor,
    resolution_px: int,
    dtype: torch.dtype,
) -> prepare.TrainInputs:
    """Build the inputs of a run from one photo, whose prompts all have one text.

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
    crop = dataset.EncodedCrop(latents, {"time_ids": ids}, None)
    samples = RepeatedSample((crop, "a photo of sks dog"))
    return prepare.TrainInputs(
        pipeline=pipeline,
        family=family,
        schedule=noise_schedule.build_noise_schedule(pipeline.scheduler),
        photos=[],
        dataloader=dataset.TrainDataLoader(samples),
        text_cache=lambda prompts: [text] * len(prompts),
        dtype=dtype,
    )


def measure_step(size: str, config: TrainConfig) -> dict[str, float]:
    """Measure a batch as `config` says, on the device that accelerate chooses.

    Returns floor_sec, step_sec and peak_gib.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    materials = build_random_inputs(
        size, config.resolution, PRECISION_DTYPES[config.mixed_precision]
    )
    unet = materials.pipeline.unet.requires_grad_(False).to(accelerator.device)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()

    # the lower bound, before the trainer's step takes its memory
    floor_sec = measure_second_call(
        build_floor_step(materials, config, accelerator.device), accelerator.device
    )
    train_step = TrainStep(config, materials, accelerator, max_train_steps=10)

    def run_step() -> None:
        train_step.update_adapter(train_step.accumulate_gradients())

    step_sec = measure_second_call(run_step, accelerator.device)
    if accelerator.device.type == "cuda":
        peak_gib = torch.cuda.max_memory_allocated() / devices.GIB
    else:
        peak_gib = devices.measure_peak_gib(accelerator.device)
    return {"floor_sec": floor_sec, "step_sec": step_sec, "peak_gib": peak_gib}


def build_floor_step(
    inputs: prepare.TrainInputs, config: TrainConfig, device: torch.device
) -> Callable[[], None]:
    """Build one forward pass of the frozen UNet in training mode with its input's gradient: the
    lower bound of a step."""
    unet = inputs.pipeline.unet.train()
    batch = inputs.dataloader.load_batch(range(config.train_batch_size))

    # what the UNet is told, on the device
    texts = []
    for text in inputs.text_cache(batch.prompts):
        texts.append(families.cast_embedding(text, device, inputs.dtype))
    text_inputs = inputs.family.collate(texts)
    photo_inputs = {name: tensor.to(device) for name, tensor in batch.photo_inputs.items()}
    times = torch.tensor([500], device=device)

    def run_step() -> None:
        noisy = torch.randn_like(batch.latents, device=device, dtype=inputs.dtype)
        noisy.requires_grad_()
        prediction = inputs.family.predict(unet, noisy, times, **photo_inputs, **text_inputs)
        prediction.float().square().mean().backward()

    return run_step


def measure_second_call(step: Callable[[], None], device: torch.device) -> float:
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
    print(json.dumps(measure_step(args.size, config)))


if __name__ == "__main__":
    main()
