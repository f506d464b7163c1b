"""Live adapters on small models, for the tests of files."""

import torch

from dreambooth_moslora.lora.metadata import AdapterMetadata
from dreambooth_moslora.lora.raw_file import build_adapter_metadata
from dreambooth_moslora.method.moslora import (
    MoSLoraConfig,
    inject,
    list_adapter_parameters,
)
from dreambooth_moslora.settings import field_facts
from tests.helpers.tiny import tiny_text_config, tiny_unet

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]
CONVOLUTIONS = ["conv1", "conv_shortcut", "downsamplers.0.conv", "to_q"]


def shake(model: torch.nn.Module, adapter_name: str = "default", seed: int = 5) -> None:
    """Stand in for training: move every adapter weight, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in list_adapter_parameters(model, adapter_name):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def text_encoders() -> dict[str, torch.nn.Module]:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    return {
        "text_encoder": CLIPTextModel(tiny_text_config(16, 31)),
        "text_encoder_2": CLIPTextModelWithProjection(tiny_text_config(32, 31, projection_dim=32)),
    }


def live(with_text: bool = False, **options) -> dict[str, torch.nn.Module]:
    """Components with a moved adapter. alpha differs from the rank, so that a lost alpha shows."""
    components = {"unet": tiny_unet()} | (text_encoders() if with_text else {})
    for name, model in components.items():
        targets = list(field_facts.ATTENTION_LAYERS) if name == "unet" else PROJECTIONS
        inject(
            model, MoSLoraConfig(**{"r": 4, "lora_alpha": 11, "target_modules": targets} | options)
        )
        shake(model)
    return components


def facts_of(components: dict, **more) -> AdapterMetadata:
    args = {
        "base_id": "some/base",
        "trigger_words": ("sks dog",),
        "class_word": "dog",
        "resolution_px": 1024,
    }
    return build_adapter_metadata(components, **args | more)
