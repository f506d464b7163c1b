"""Small random models that look at pictures, with true preprocessing: CLIP and DINOv2, CLIPSeg,
Qwen3-VL."""

import json
from pathlib import Path

import torch
import transformers
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from dreambooth_moslora.evaluation.metrics import Encoders, load_encoders
from tests.helpers.tiny import tiny_text_config, tiny_tokenizer
from tests.helpers.tiny_families import qwen_tokenizer

SIDE_PX = 32
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE_PX,
    "patch_size": 8,
}
MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def save_tiny_encoders(folder: Path) -> tuple[Path, Path]:
    """Write a CLIP and a DINOv2 of few layers; returns both folders."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder / "tokenizer_files")
    text = tiny_text_config(16, tokenizer.eos_token_id).to_dict()
    config = transformers.CLIPConfig(
        text_config=text, vision_config=VISION | {"intermediate_size": 32}, projection_dim=24
    )
    clip, dino = (
        transformers.CLIPModel(config),
        transformers.Dinov2Model(transformers.Dinov2Config(**VISION)),
    )
    sizes = {"size": {"shortest_edge": SIDE_PX}, "crop_size": {"height": SIDE_PX, "width": SIDE_PX}}
    for part in (clip, tokenizer, transformers.CLIPImageProcessor(**sizes)):
        part.save_pretrained(folder / "clip")
    for part in (dino, transformers.BitImageProcessor(**sizes)):
        part.save_pretrained(folder / "dino")
    return folder / "clip", folder / "dino"


def tiny_encoders(folder: Path) -> Encoders:
    clip, dino = save_tiny_encoders(folder)
    return load_encoders(clip=clip, dino=dino)


def save_tiny_clipseg(folder: Path) -> Path:
    """Write a CLIPSeg of two layers, whose answers are large enough to differ; returns the
    folder."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder / "tokenizer_files")
    parts = {
        "text_config": tiny_text_config(16, tokenizer.eos_token_id).to_dict(),
        "projection_dim": 16,
    }
    parts |= {
        "vision_config": VISION | {"intermediate_size": 32},
        "reduce_dim": 16,
        "extract_layers": [0, 1],
    }
    decoder = {
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
        "initializer_factor": 20.0,
    }
    model = transformers.CLIPSegForImageSegmentation(transformers.CLIPSegConfig(**parts, **decoder))
    model.save_pretrained(folder / "clipseg")
    pictures = transformers.ViTImageProcessor(size={"height": SIDE_PX, "width": SIDE_PX})
    transformers.CLIPSegProcessor(pictures, tokenizer).save_pretrained(folder / "clipseg")
    return folder / "clipseg"


def save_tiny_chat_model(folder: Path) -> Path:
    """Write a Qwen3-VL of two layers; returns the folder."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    ids = {mark.strip("<|>"): tokenizer.convert_tokens_to_ids(mark) for mark in MARKS}
    shared = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 1.0}
    text = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    text |= {"vocab_size": len(tokenizer), "eos_token_id": ids["im_end"], "rope_parameters": rope}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 16, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    places = {
        f"{name}_token_id": ids[mark]
        for name, mark in (("image", "image_pad"), ("video", "video_pad"))
    }
    places |= {f"{name}_token_id": ids[name] for name in ("vision_start", "vision_end")}
    config = transformers.Qwen3VLConfig(
        text_config=shared | text, vision_config=shared | vision, **places
    )
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(folder / "chat")
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    kind = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16, "size": size}
    (folder / "images").mkdir()
    (folder / "images" / "preprocessor_config.json").write_text(json.dumps(kind), encoding="utf-8")
    images = transformers.AutoImageProcessor.from_pretrained(folder / "images")
    processor = transformers.Qwen3VLProcessor(
        images, tokenizer, Qwen3VLVideoProcessor(), chat_template=TEMPLATE
    )
    processor.save_pretrained(folder / "chat")
    return folder / "chat"
