"""Random LoRA files for the tiny base, in the forms that other programs write."""

import hashlib
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from dreambooth_moslora.method import moslora

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def random_lora(
    unet: UNet2DConditionModel, seed: int, rank: int = 4, size: float = 0.5
) -> dict[str, torch.Tensor]:
    """PEFT state dict of a LoRA with random weights, in a copy: `unet` stays as it was."""
    twin = UNet2DConditionModel.from_config(unet.config)
    twin.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(seed)
    state = get_peft_model_state_dict(twin)
    return {
        key: torch.randn(value.shape, generator=generator) * size for key, value in state.items()
    }


def save_diffusers_lora(unet: UNet2DConditionModel, folder: Path, seed: int = 0, **options) -> Path:
    """`folder`/pytorch_lora_weights.safetensors, as `save_lora_weights` writes it."""
    StableDiffusionXLPipeline.save_lora_weights(
        folder, unet_lora_layers=random_lora(unet, seed, **options)
    )
    return folder / "pytorch_lora_weights.safetensors"


def save_kohya_lora(unet: UNet2DConditionModel, file: Path, seed: int = 0, **options) -> Path:
    """The same weights under kohya's names, with alpha = rank."""
    state = {f"unet.{key}": value for key, value in random_lora(unet, seed, **options).items()}
    save_file(convert_state_dict_to_kohya(convert_all_state_dict_to_peft(state)), file)
    return file


def base_bytes(pipeline: StableDiffusionXLPipeline) -> str:
    """Of every tensor of the base, by the names that it has without PEFT."""
    digest = hashlib.sha256()
    for component in ("unet", "text_encoder", "text_encoder_2", "vae"):
        tensors = getattr(pipeline, component).state_dict()
        plain = {k.replace(".base_layer.", "."): v for k, v in tensors.items() if ".lora_" not in k}
        for key in sorted(plain):
            digest.update(key.encode() + plain[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


def set_scale(model, scale: float, adapter_name: str = "default") -> None:
    """Multiply the adapter's own s = alpha/r by `scale` (1 = as trained)."""
    for layer in moslora.get_adapter_layers(model, adapter_name).values():
        layer.set_scale(adapter_name, scale)
