"""Small random CLIP and DINOv2 models with true preprocessing, in memory and as folders."""

from pathlib import Path

import torch
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)

from dreambooth_moslora.evaluation.metrics import Encoders, load_encoders
from tests.helpers.tiny import tiny_text_config, tiny_tokenizer

SIDE_PX = 32


def save_tiny_encoders(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write a CLIP and a DINOv2 of one layer each; returns both folders."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(folder / "tokenizer_files")
    text: CLIPTextConfig = tiny_text_config(16, tokenizer.eos_token_id)
    vision = CLIPVisionConfig(
        image_size=SIDE_PX,
        patch_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    size = {"shortest_edge": SIDE_PX}
    crop = {"height": SIDE_PX, "width": SIDE_PX}
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24))
    dino = Dinov2Model(
        Dinov2Config(image_size=SIDE_PX, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    )
    for part in (clip, tokenizer, CLIPImageProcessor(size=size, crop_size=crop)):
        part.save_pretrained(folder / "clip")
    for part in (dino, BitImageProcessor(size=size, crop_size=crop)):
        part.save_pretrained(folder / "dino")
    return folder / "clip", folder / "dino"


def tiny_encoders(folder: Path, seed: int = 0) -> Encoders:
    clip, dino = save_tiny_encoders(folder, seed)
    return load_encoders(clip=clip, dino=dino)
