"""GPU memory and kernels of a training step of each family's full-size denoiser, and the memory of
its samples, counted on the meta device.

    python -m benchmarks.family_memory        # every model and plan; some minutes
    python -m benchmarks.family_memory --models Z-Image --resolutions 512 1024 --ranks 16 64

It needs no GPU and no weights: the configurations are those of the published models. `gpu_memory`
says what is counted. NF4 and int8 are the recomputed step with the bytes of quantised layers. Where
blocks are streamed, as many count as have places there, each as large as the largest one.
Workspaces of bitsandbytes are in no count. The encoders are gone by then. Beside a step's kernels
are those of the same step by PEFT's own layers. The estimate is that of `--dry_run`; it is read
from the shapes of the weights.

A sample between two steps takes what stays of them, gradients too, the VAE, and the larger of two:
a forward pass by PEFT's own layers, as in `generate`, with and without the prompt where the
pipeline makes both as one; and the decoder in its smallest tiles, as where memory is short. A run
draws with its working copies, which take less: a line shows both. A flow's VAE works in bf16, a
UNet's in fp32.
"""

import argparse
import gc
import itertools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from torch import Tensor, nn

from benchmarks.gpu_memory import create_empty
from benchmarks.meta_count import GIB, Count, Counter, count_bytes, patch_attention
from benchmarks.peft_layers import restore_peft_layers
from dreambooth_moslora.base import decode, devices
from dreambooth_moslora.base.devices import CONTEXT_GIB, OUTPUTS_PER_BLOCK, RESIDENT_BLOCKS
from dreambooth_moslora.base.families import FAMILY_CLASSES
from dreambooth_moslora.base.load import get_pipeline_class
from dreambooth_moslora.base.quantization import list_block_layers
from dreambooth_moslora.base.streaming import list_streamed_blocks
from dreambooth_moslora.extras.lab.full_step import SDXL
from dreambooth_moslora.method.fast_linear import WorkingCopies
from dreambooth_moslora.plan.base_size import BaseSize, compute_base_size
from dreambooth_moslora.plan.memory import (
    GRADIENT_BYTES,
    QUANTIZED_BYTES,
    STREAMED_BYTES,
    estimate_memory,
)
from dreambooth_moslora.settings.family_facts import FAMILIES, UNET_SETTINGS, FamilyFacts
from dreambooth_moslora.settings.memory_presets import MEMORY_PLANS
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training.adapters import add_adapters

__all__ = [
    "MODELS",
    "COUNTED_PLANS",
    "measure_decoding_gib",
    "print_deviations",
    "build_vae",
    "main",
]

COUNTED_PLANS = {
    name: plan for name, plan in MEMORY_PLANS.items() if not plan.keys() & set(UNET_SETTINGS)
}
"""Those of transformers."""
SD3_MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD3_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
}
KLEIN_9B = {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
TextInputs = dict[str, Any]
"""One prompt, as the arguments of `predict`."""


def build_pooled_inputs(tokens: int, width: int, pooled_width: int) -> Callable[[], TextInputs]:
    return lambda: {
        "prompt_embeds": create_empty(1, tokens, width),
        "pooled_prompt_embeds": create_empty(1, pooled_width),
    }


def build_masked_inputs(tokens: int, width: int, prompt_tokens: int) -> Callable[[], TextInputs]:
    """Return inputs of `tokens` tokens, of which the first `prompt_tokens` are the prompt's: the
    family reads that in a mask with values."""
    return lambda: {
        "prompt_embeds": create_empty(1, tokens, width),
        "prompt_attention_mask": torch.arange(tokens, device="cpu")[None] < prompt_tokens,
    }


# name: its family, its configuration, channels of its latents and pixels a side of each, one prompt
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, int], Callable[[], TextInputs]]] = {
    "SDXL": ("sdxl", SDXL, (4, 8), build_pooled_inputs(77, 2048, 1280)),
    "SD 1.5": (
        "sd1",
        {"cross_attention_dim": 768},
        (4, 8),
        lambda: {"prompt_embeds": create_empty(1, 77, 768)},
    ),
    "SD 3.5 medium": (
        "sd3",
        {
            "sample_size": 128,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            **SD3_MEDIUM,
        },
        (16, 8),
        build_pooled_inputs(333, 4096, 2048),
    ),
    "SD 3.5 large": (
        "sd3",
        {
            "sample_size": 128,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            **SD3_LARGE,
        },
        (16, 8),
        build_pooled_inputs(333, 4096, 2048),
    ),
    "FLUX.1 dev": ("flux", {"guidance_embeds": True}, (16, 8), build_pooled_inputs(512, 4096, 768)),
    "FLUX.2 klein 4B": (
        "flux2",
        {**KLEIN_4B, "guidance_embeds": False},
        (128, 16),
        lambda: {"prompt_embeds": create_empty(1, 512, 7680)},
    ),
    "FLUX.2 klein 9B": (
        "flux2",
        {**KLEIN_9B, "guidance_embeds": False},
        (128, 16),
        lambda: {"prompt_embeds": create_empty(1, 512, 12288)},
    ),
    "FLUX 3 klein": (
        "flux3",
        {},
        (128, 16),
        lambda: {"prompt_embeds": [create_empty(80, 20480)]},
    ),
    "Z-Image": ("z_image", {}, (16, 8), lambda: {"prompt_embeds": [create_empty(64, 2560)]}),
    "Qwen-Image": (
        "qwen_image",
        {},
        (16, 8),
        lambda: {"prompt_embeds": create_empty(1, 64, 3584), "prompt_embeds_mask": None},
    ),
    "Qwen-Image-2.1": (
        "qwen_image21",
        {},
        (64, 16),
        lambda: {"prompt_embeds": create_empty(1, 64, 4096), "prompt_embeds_mask": None},
    ),
    "Anima": (
        "anima",
        {"num_attention_heads": 16, "extra_pos_embed_type": None},
        (16, 8),
        lambda: {"prompt_embeds": create_empty(1, 512, 1024)},
    ),
    "Krea 2": (
        "krea2",
        {},
        (16, 8),
        lambda: {"prompt_embeds": create_empty(1, 64, 12, 2560), "prompt_embeds_mask": None},
    ),
    "Lumina 2": (
        "lumina2",
        {"cap_feat_dim": 2304},
        (16, 8),
        build_masked_inputs(256, 2304, prompt_tokens=64),
    ),
    "Sana": ("sana", {}, (32, 32), build_masked_inputs(300, 2304, prompt_tokens=300)),
}

AUTOENCODER_KL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
CONFIG_16_CHANNELS = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
SANAS_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
# family: the configuration of its VAE, where that is not its class's own
VAES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("sdxl", "sd1"), AUTOENCODER_KL),
    **dict.fromkeys(("sd3", "flux", "z_image", "lumina2"), AUTOENCODER_KL | CONFIG_16_CHANNELS),
    "sana": {
        "encoder_block_types": SANAS_BLOCKS,
        "decoder_block_types": SANAS_BLOCKS,
        "upsample_block_type": "interpolate",
        "downsample_block_type": "Conv",
    },
}
CFG_BATCHED_FAMILIES = ("sdxl", "sd1", "sd3", "z_image", "sana")
"""Families whose pipelines pass a picture with and without its prompt as a batch."""


def build_config(facts: FamilyFacts, resolution: int, rank: int, plan: str) -> TrainConfig:
    usual = {
        "instance_data_dir": ".",
        "instance_prompt": "a photo of sks dog",
        "train_batch_size": 1,
    }
    settings = {
        "resolution": resolution,
        "rank": rank,
        "target_modules": facts.targets,
        "mixed_precision": "bf16",
    }
    return TrainConfig(**usual, **settings, **COUNTED_PLANS[plan])


def find_facts(family: str) -> FamilyFacts:
    return next(facts for facts in FAMILIES if facts.name == family)


def build_denoiser(family: str, options: dict[str, Any]) -> tuple[FamilyFacts, nn.Module]:
    """Build the frozen denoiser of this configuration in bf16 on the meta device."""
    facts = find_facts(family)
    with torch.device("meta"):
        model = getattr(diffusers, facts.model)(**options)
    if facts.name == "qwen_image21":
        model.forward = wrap_forward(model.forward)
    return facts, model.to(torch.bfloat16).requires_grad_(False).train()


def wrap_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Give Qwen-Image-2.1's transformer a mask with values, from which it reads where the picture
    lies. Nothing else on the meta device has values."""

    def computed(pixels, texts, time, shapes, mask, **options):
        in_picture = torch.arange(mask.shape[1], device="cpu") >= texts.shape[1]
        with torch.device("cpu"):
            return forward(pixels, texts, time, shapes, in_picture[None], **options)

    return computed


def build_prediction(
    name: str, facts: FamilyFacts, denoiser: nn.Module, resolution: int
) -> Callable[[], Tensor]:
    """Return the forward pass of one picture with one prompt."""
    channels, pixels = MODELS[name][2]
    family = FAMILY_CLASSES[facts.name](facts, embedded_guidance=3.5)
    z, time = (
        create_empty(1, channels, resolution // pixels, resolution // pixels),
        torch.empty(1, device="meta"),
    )
    return lambda: family.predict(denoiser, z, time, create_empty(1, 6), **MODELS[name][3]())


def count(name: str, facts: FamilyFacts, denoiser: nn.Module, resolution: int) -> Count:
    """Count one step of one picture by the adapted denoiser, as in `gpu_memory`."""
    copies, predict = WorkingCopies(denoiser), build_prediction(name, facts, denoiser, resolution)
    with (
        torch.device("meta"),
        Counter() as counter,
        patch_attention(),
        copies.attach_copies() as step,
    ):
        loss = predict().float().square().mean()
        live_bytes = counter.live
        loss.backward()
        step.collect()
    denoiser.zero_grad(set_to_none=True)
    return Count(live_bytes / GIB, counter.peak / GIB, counter.kernels)


def count_drawing(
    name: str, facts: FamilyFacts, denoiser: nn.Module, resolution: int, is_fused: bool
) -> Count:
    """Count a step of denoising one picture by the adapted denoiser: with working copies, as
    between two steps of training, or by PEFT's layers."""
    predict = build_prediction(name, facts, denoiser, resolution)
    copies = WorkingCopies(denoiser).attach_copies() if is_fused else nullcontext()
    with torch.device("meta"), copies, Counter() as counter, patch_attention(), torch.no_grad():
        predict()
    batch = 2 if facts.name in CFG_BATCHED_FAMILIES else 1
    return Count(0.0, counter.peak / GIB * batch, counter.kernels)


@cache
def build_vae(family: str) -> nn.Module:
    """Build a family's VAE on the meta device."""
    facts = find_facts(family)
    kind = get_pipeline_class(facts)._get_signature_types()["vae"][0]
    with torch.device("meta"):
        vae = kind(**VAES.get(family, {}))
    return vae.to(torch.bfloat16 if facts.style == "flow" else torch.float32).eval()


@cache
def measure_decoding_gib(family: str, resolution: int, is_short: bool) -> float:
    """Measure the peak of decoding one picture beside the VAE's weights: whole, or in its smallest
    tiles if `is_short` of memory."""
    vae = build_vae(family)

    # Qwen's VAEs are of videos, of which a picture is one frame.
    scale = getattr(vae, "spatial_compression_ratio", None) or decode.get_pixels_per_latent(vae)
    sides = [resolution // scale] * 2
    is_of_videos = "z_dim" in vae.config
    shape = (vae.config.z_dim, 1, *sides) if is_of_videos else (vae.config.latent_channels, *sides)
    free_gib = 0.0 if is_short else None
    with (
        torch.device("meta"),
        Counter() as counter,
        patch_attention(),
        torch.no_grad(),
        patch.object(devices, "measure_free_gib", lambda device: free_gib),
        decode.enable_tiling(vae, [resolution] * 2, vae.device),
    ):
        vae.decode(torch.empty(1, *shape, dtype=vae.dtype))
    return counter.peak / GIB


def format_decoding(facts: FamilyFacts, resolution: int) -> str:
    """Format the memory that decoding a picture takes, whole and in tiles, beside the row in
    `family_facts`."""
    estimated_bytes = facts.decoder_bytes_per_pixel / (2 if facts.style == "flow" else 1)
    parts = []
    for is_short, side in ((False, resolution), (True, min(resolution, facts.tile_px))):
        peak = measure_decoding_gib(facts.name, resolution, is_short)
        estimated = side**2 * estimated_bytes / GIB
        label = f"in tiles of {side} px" if is_short else f"    decoder: {side} px"
        counted = f"{peak:.3f} GiB, {peak * GIB / side**2:,.0f} bytes a pixel"
        parts.append(f"{label}: {counted}, estimate {estimated:.3f} {estimated / peak - 1:+.1%}")
    return "; ".join(parts)


def compute_saved_gib(denoiser: nn.Module, plan: str) -> float:
    """Return by how many GiB quantization makes the weights smaller."""
    kind = COUNTED_PLANS[plan].get("base_quantization")
    layers = [layer for _, layer in list_block_layers(denoiser) if isinstance(layer, nn.Linear)]
    numbers = sum(
        layer.weight.numel() for layer in layers if layer.out_features % OUTPUTS_PER_BLOCK == 0
    )
    return numbers * (2 - QUANTIZED_BYTES[kind]) / GIB if kind else 0.0


def compute_host_gib(denoiser: nn.Module, plan: str) -> float:
    """Return the GiB of weights that streaming keeps on the host: all blocks but those that have a
    place on the GPU."""
    if not COUNTED_PLANS[plan].get("stream_blocks"):
        return 0.0
    bytes_per_number = STREAMED_BYTES.get(COUNTED_PLANS[plan].get("base_quantization"), 2)
    blocks = []
    for block in list_streamed_blocks(denoiser):
        numbers = sum(layer.weight.numel() for layer in block.layers)
        blocks.append(numbers * bytes_per_number / GIB)
    return sum(blocks) - RESIDENT_BLOCKS * max(blocks)


def format_row(size: BaseSize, steps: dict[bool, float], drawing: float) -> str:
    """Format the counts as a row of `family_facts`, without `text_tokens`, `encoders` and `vae`.

    steps: GiB of a step without gradients, by whether it is recomputed
    drawing: GiB of `count_drawing` by PEFT's layers
    """
    memory = f"full_gib={steps[False]:.3f}, recomputed_gib={steps[True]:.3f}"
    memory += f", drawing_gib={drawing:.3f}, parameters={size.unet / 1e9:.3f}e9"
    model = f"parameters={size.unet:_}, in_blocks={size.projections:_}, streamed={size.streamed:_}"
    model += f", largest_block={size.largest_block:_}, adapted_layers={size.adapted_layers}"
    return f"    Memory({memory})\n    Model({model}, adapted_widths={size.adapted_widths:_})"


def list_shapes(model: nn.Module) -> dict[str, list[int]]:
    return {path: list(weight.shape) for path, weight in model.named_parameters()}


def print_deviations(name: str, resolution: int, rank: int) -> list[tuple[float, float]]:
    """Print a line for each of `COUNTED_PLANS`, one of the decoder, and the model's row; returns
    estimate / count - 1 of each, of a step and of samples."""
    measured, counts, steps = [], {}, {}
    vae = build_vae(MODELS[name][0])
    for plan in COUNTED_PLANS:
        # What the program says
        gc.collect()
        facts, denoiser = build_denoiser(*MODELS[name][:2])
        config = build_config(facts, resolution, rank, plan)
        shapes = {facts.denoiser: list_shapes(denoiser), "vae": list_shapes(vae)}
        size = compute_base_size(facts, shapes, facts.targets)
        estimate = estimate_memory(config, size, total_steps=100)
        weights = count_bytes(denoiser) / GIB - compute_saved_gib(denoiser, plan)
        weights -= compute_host_gib(denoiser, plan)

        # What is counted: a step and a sample, once for plans that compute the same
        with torch.device("meta"):
            add_adapters(config, {facts.denoiser: denoiser})
        adapter = sum(weight.numel() for weight in denoiser.parameters() if weight.requires_grad)
        is_recomputed = config.gradient_checkpointing
        if is_recomputed not in counts:
            ours = count(name, facts, denoiser, resolution)
            steps[is_recomputed] = ours.peak_gib - adapter * GRADIENT_BYTES / GIB
            drawings = [
                count_drawing(name, facts, denoiser, resolution, is_fused)
                for is_fused in (True, False)
            ]
            restore_peft_layers(denoiser)
            counts[is_recomputed] = ours, count(name, facts, denoiser, resolution)
        counted, of_peft = counts[is_recomputed]

        # Both side by side
        staying = weights + adapter * 12 / GIB + CONTEXT_GIB
        sample_gib = max(
            drawings[1].peak_gib, measure_decoding_gib(facts.name, resolution, is_short=True)
        )
        sample_gib += count_bytes(vae) / GIB + adapter * GRADIENT_BYTES / GIB
        totals = [
            (staying + counted.peak_gib, estimate.training_gib),
            (staying + sample_gib, estimate.sampling_gib),
        ]
        line = (
            f"{f'{name}, {resolution} px, rank {rank}, {plan}':48} {counted.kept_gib:6.2f} "
            f"{counted.peak_gib:6.2f}"
        )
        kernels = f"{counted.kernels:8,} {of_peft.kernels:8,} kernels"
        for total, estimated in totals:
            kernels += f" {total:7.2f} {estimated:9.2f} {estimated / total - 1:+7.1%}"
        print(f"{line} {kernels}", flush=True)
        measured.append(tuple(estimated / total - 1 for total, estimated in totals))
    print(format_decoding(facts, resolution))
    costs = [f"{drawing.kernels:,} kernels and {drawing.peak_gib:.2f} GiB" for drawing in drawings]
    print(f"    a pass of drawing: {costs[0]}; by PEFT's layers {costs[1]}")
    print(format_row(size, steps, drawings[1].peak_gib), flush=True)
    return measured


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL"
    )
    options.add_argument(
        "--resolutions", nargs="+", type=int, metavar="PX", help="default: the model's own"
    )
    options.add_argument("--ranks", nargs="+", type=int, default=[16], metavar="R")
    options = options.parse_args(arguments)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    head = f"{'bf16, one picture':48} {'kept':>6} {'peak':>6} {'ours':>8} {'of PEFT':>16}"
    for total in ("total", "samples"):
        head += f" {total:>7} {'estimate':>9} {'error':>7}"
    print(head)
    errors = {}
    for name, rank in itertools.product(options.models, options.ranks):
        for resolution in options.resolutions or [find_facts(MODELS[name][0]).resolution_px]:
            errors[name, resolution, rank] = print_deviations(name, resolution, rank)
    for plan, of_plan in zip(COUNTED_PLANS, zip(*errors.values(), strict=True), strict=True):
        of_steps, of_samples = zip(*of_plan, strict=True)
        summary = f"{max(map(abs, of_steps)):.1%}, of samples "
        summary += f"{min(of_samples):+.1%} to {max(of_samples):+.1%}"
        print(f"largest deviation of the estimate, {plan}: {summary}")


if __name__ == "__main__":
    main()
