"""Training step like that of diffusers' `train_dreambooth_lora_sdxl.py`, for comparison; written
from its behaviour.

Its costs: the VAE (fp32) and both text encoders stay in memory; the photo is encoded again in every
step; UNet and adapter are in bf16 (the script upcasts the adapter for fp16 only) with PEFT's own
casting of inputs; accelerate wraps the forward in autocast; AdamW has PyTorch's default settings,
malloc the system's.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import nn

from benchmarks.precision import build_bf16_accelerator
from benchmarks.random_sdxl import build_random_encoders, build_random_unet, build_random_vae

__all__ = ["build_diffusers_style_step"]


@torch.no_grad()
def embed_prompt(encoders: tuple[nn.Module, nn.Module]) -> tuple[torch.Tensor, torch.Tensor]:
    """Text embeddings (1, 77, D) and pooled (1, P) of one prompt, once, before the loop."""
    ids = torch.arange(77)[None]
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    return torch.cat([o.hidden_states[-2] for o in outputs], dim=-1), outputs[1][0]


def load_models(size: str) -> tuple[tuple[nn.Module, nn.Module], AutoencoderKL, nn.Module]:
    """Load all models in fp32, as `from_pretrained` without a dtype does, then cast all but the VAE
    to bf16."""
    encoders = build_random_encoders(size, torch.float32)
    vae, unet = build_random_vae(size, torch.float32), build_random_unet(size, torch.float32)
    for module in (*encoders, vae, unet):
        module.requires_grad_(False)
    for module in (unet, *encoders):
        nn.Module.to(module, torch.bfloat16)
    return encoders, vae, unet


def encode_photo(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Encode the photo again in fp32, sample its latents and cast them to the UNet's dtype."""
    latents = vae.encode(pixels.to(vae.dtype)).latent_dist.sample() * vae.config.scaling_factor
    return latents.to(torch.bfloat16)


def build_diffusers_style_step(
    size: str,
    resolution_px: int,
    rank: int,
    gradient_checkpointing: bool,
    fp32_adapter: bool = False,
) -> Callable[[], tuple[float, float]]:
    """Build everything and return the step: () -> (loss, gradient norm)."""
    accelerator = build_bf16_accelerator()
    schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    encoders, vae, unet = load_models(size)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
    )
    if fp32_adapter:
        cast_training_params(unet)
    embeds, pooled = embed_prompt(encoders)
    conditions = {
        "text_embeds": pooled,
        "time_ids": torch.tensor([[resolution_px] * 2 + [0, 0] + [resolution_px] * 2]),
    }
    photo = torch.randn(1, 3, resolution_px, resolution_px).clamp(-1, 1)
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4)
    lr_scheduler = get_scheduler("constant", optimizer)
    unet, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    unet.train()

    def step() -> tuple[float, float]:
        latents = encode_photo(vae, photo)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, schedule.config.num_train_timesteps, (1,))
        noisy = schedule.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, embeds, added_cond_kwargs=conditions).sample
        loss = F.mse_loss(prediction.float(), noise.float())
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        return loss.item(), float(norm)

    # The encoders stay in memory during the loop: the script deletes its list of them, not the
    # models.
    step.thumbnails = encoders
    return step
