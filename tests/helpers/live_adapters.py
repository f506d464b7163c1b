"""Live adapters on small models, for the tests of files."""

import torch

from dreambooth_moslora.adapters import export
from dreambooth_moslora.adapters.moslora import ATTENTION_PROJECTIONS, MoSLoraConfig, inject
from dreambooth_moslora.adapters.raw_file import adapter_metadata
from tests.adapters.test_moslora import shake
from tests.adapters.test_moslora_models import PROJECTIONS
from tests.helpers.tiny import tiny_text_config, tiny_unet


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
        targets = list(ATTENTION_PROJECTIONS) if name == "unet" else PROJECTIONS
        inject(model, MoSLoraConfig(**{"r": 4, "lora_alpha": 11, "target_modules": targets} | options))
        shake(model)
    return components


def facts_of(components: dict, **more) -> export.AdapterMetadata:
    given = {"base_id": "some/base", "trigger_words": ("sks dog",), "class_word": "dog", "resolution_px": 1024}
    return adapter_metadata(components, **given | more)
