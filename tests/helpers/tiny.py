"""A random StableDiffusionXLPipeline of the true SDXL topology, small enough to build and run in
seconds."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreambooth_moslora.base.families import TextEmbedding

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WIDTH, WIDTH_2 = 16, 32
RESOLUTION_PX = 64


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes of GPT-2's byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(unprintable))]


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer of single bytes: every prompt is accepted."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = byte_alphabet()
    tokens = [*letters, *[c + "</w>" for c in letters], "th", BOS, EOS]
    (folder / "vocab.json").write_text(
        json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n", encoding="utf-8")
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=77,
        pad_token=EOS,
    )


def tiny_unet(seed: int = 0) -> UNet2DConditionModel:
    """SDXL's topology at widths (8, 16, 32): text_time conditioning, linear projections, three
    blocks."""
    torch.manual_seed(seed)
    sizes = {
        "sample_size": RESOLUTION_PX // 8,
        "block_out_channels": (8, 16, 32),
        "layers_per_block": 1,
    }
    sizes |= {
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 4),
        "norm_num_groups": 4,
    }
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    return UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        cross_attention_dim=WIDTH + WIDTH_2,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH_2,
        **sizes,
        **added,
    )


def tiny_text_config(width: int, eos_token_id: int, **extra) -> CLIPTextConfig:
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    marks = {
        "bos_token_id": eos_token_id - 1,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,
    }
    return CLIPTextConfig(
        vocab_size=eos_token_id + 1, max_position_embeddings=77, **sizes, **marks, **extra
    )


def tiny_sdxl(
    folder: Path, prediction_type: str = "epsilon", seed: int = 0
) -> StableDiffusionXLPipeline:
    """The whole pipeline, in memory. `folder` receives the tokenizer's two files."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(folder / "tokenizer_files")
    eos = tokenizer.convert_tokens_to_ids(EOS)
    sizes = {
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
    }
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=RESOLUTION_PX,
        scaling_factor=0.5,
        mid_block_add_attention=False,
        **sizes,
    )
    noise = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps_offset": 1,
    }
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(tiny_text_config(WIDTH, eos, hidden_act="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(
            tiny_text_config(WIDTH_2, eos, projection_dim=WIDTH_2)
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=tiny_unet(seed),
        scheduler=EulerDiscreteScheduler(
            timestep_spacing="leading", prediction_type=prediction_type, **noise
        ),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny_sdxl(folder: Path, **options) -> Path:
    """Write the pipeline as a diffusers folder and return it."""
    tiny_sdxl(folder, **options).save_pretrained(folder / "model")
    return folder / "model"


def embeds_of(texts: Sequence[TextEmbedding]) -> Tensor:
    return torch.stack([text["prompt_embeds"] for text in texts])


def equal(texts: Sequence[TextEmbedding], expected: Sequence[TextEmbedding]) -> bool:
    return all(
        text.keys() == expected_text.keys()
        and all(torch.equal(text[name], expected_text[name]) for name in text)
        for text, expected_text in zip(texts, expected, strict=True)
    )


@contextmanager
def few_steps(count: int = 2) -> Iterator[None]:
    """SDXL's pictures in so many steps while it is open: the program asks for 25, and for 50 for
    class images."""
    original = StableDiffusionXLPipeline.__call__

    def draw(self: StableDiffusionXLPipeline, *args: object, **options: object) -> object:
        return original(self, *args, **{**options, "num_inference_steps": count})

    with patch.object(StableDiffusionXLPipeline, "__call__", draw):
        yield
