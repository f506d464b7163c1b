"""A small random CLIPSeg with true preprocessing, as a folder."""

from pathlib import Path

import torch
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPSegProcessor, ViTImageProcessor

from tests.helpers.tiny import tiny_text_config, tiny_tokenizer

SIDE_PX = 32


def save_tiny_clipseg(folder: Path, seed: int = 0) -> Path:
    """Write a CLIPSeg of two layers, whose answers are large enough to differ; returns the folder."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(folder / "tokenizer_files")
    text = tiny_text_config(16, tokenizer.eos_token_id).to_dict()
    vision = {
        "image_size": SIDE_PX,
        "patch_size": 8,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPSegConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=16,
        reduce_dim=16,
        extract_layers=[0, 1],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        initializer_factor=20.0,
    )
    size = {"height": SIDE_PX, "width": SIDE_PX}
    model = CLIPSegForImageSegmentation(config)
    model.save_pretrained(folder / "clipseg")
    CLIPSegProcessor(ViTImageProcessor(size=size), tokenizer).save_pretrained(folder / "clipseg")
    return folder / "clipseg"
