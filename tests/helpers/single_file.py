"""Bases in one `.safetensors` file, in the layout of their authors."""

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

PREFIX = "model.diffusion_model."
"""How the names of the denoiser begin in a whole checkpoint."""
Z_IMAGE = {
    "all_final_layer.2-1.": "final_layer.",
    "all_x_embedder.2-1.": "x_embedder.",
    "attention.norm_": "attention.",
    "attention.to_out.0": "attention.out",
    "attention.q.": "attention.q_norm.",
    "attention.k.": "attention.k_norm.",
}

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}


def save_single_file(pipeline: StableDiffusionXLPipeline, path: Path) -> Path:
    """All weights in the original layout of SDXL's authors, as model sites distribute it: UNet
    blocks are numbered through (`input_blocks.4.1…`), the second text encoder is open_clip's with
    its three attention matrices in one, its projection is transposed, and the VAE counts its
    decoder's blocks from the other end."""
    parts = {
        "model.diffusion_model.": unet_layout(
            pipeline.unet.state_dict(), pipeline.unet.config.layers_per_block
        ),
        "first_stage_model.": vae_layout(pipeline.vae.state_dict()),
        "conditioner.embedders.0.transformer.text_model.": clip_layout(
            pipeline.text_encoder.state_dict()
        ),
        "conditioner.embedders.1.model.": open_clip_layout(pipeline.text_encoder_2.state_dict()),
    }
    tensors = {
        prefix + name: value for prefix, part in parts.items() for name, value in part.items()
    }
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path)
    return path


def renamed(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def unet_layout(state: Tensors, layers: int) -> Tensors:
    return {unet_name(name, layers, state): value for name, value in state.items()}


def vae_layout(state: Tensors) -> Tensors:
    blocks = 1 + max(
        int(match[1]) for name in state if (match := re.search(r"up_blocks\.(\d+)", name))
    )
    return {vae_name(name, blocks): value for name, value in state.items()}


def unet_name(name: str, layers: int, state: Tensors) -> str:
    end = next((end for end in UNET_ENDS if name.startswith(end + ".")), None)
    if end is not None:
        return UNET_ENDS[end] + name.removeprefix(end)
    side, suffix = name.split("_block", 1)
    if side == "mid":
        kind, number, suffix = suffix.removeprefix(".").split(".", 2)
        place = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block.{place}.{renamed(suffix, RESNET) if kind == 'resnets' else suffix}"
    block, kind, number, suffix = suffix.removeprefix("s.").split(".", 3)
    at = int(block) * (layers + 1) + int(number)
    if kind == "downsamplers":
        place = 1 + int(block) * (layers + 1) + layers
        return f"input_blocks.{place}.0.op.{suffix.removeprefix('conv.')}"
    if kind == "upsamplers":
        place = 2 if any(key.startswith(f"up_blocks.{block}.attentions") for key in state) else 1
        return f"output_blocks.{int(block) * (layers + 1) + layers}.{place}.{suffix}"
    home = f"input_blocks.{1 + at}" if side == "down" else f"output_blocks.{at}"
    return f"{home}.1.{suffix}" if kind == "attentions" else f"{home}.0.{renamed(suffix, RESNET)}"


def vae_name(name: str, blocks: int) -> str:
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{blocks - 1 - int(match[1])}", name)
    names = {
        "down_blocks": "down",
        "resnets": "block",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
    }
    return renamed(name, names | {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"})


def clip_layout(state: Tensors) -> Tensors:
    """Some versions of transformers say `text_model.` before each name, others do not."""
    return {name.removeprefix("text_model."): value for name, value in state.items()}


def open_clip_layout(state: Tensors) -> Tensors:
    layout: Tensors = {}
    for name, value in clip_layout(state).items():
        if name == "text_projection.weight":
            layout["text_projection"] = value.T
        elif (match := re.fullmatch(r"(.+\.self_attn)\.q_proj\.(weight|bias)", name)) is not None:
            three = [state.get(f"text_model.{match[1]}.{p}_proj.{match[2]}") for p in "qkv"]
            layout[renamed(match[1], OPEN_CLIP) + f".in_proj_{match[2]}"] = torch.cat(three)
        elif not re.search(r"\.[kv]_proj\.", name):
            layout[renamed(name, OPEN_CLIP)] = value
    return layout


def z_image_layout(state: Tensors) -> Tensors:
    """The three projections of attention are one matrix."""
    layout = {}
    for name, value in state.items():
        for ours, theirs in Z_IMAGE.items():
            name = name.replace(ours, theirs)
        if "attention.to_q." in name:
            three = [state[name.replace("to_q", f"to_{letter}")] for letter in "qkv"]
            layout[PREFIX + name.replace("to_q", "qkv")] = torch.cat(three)
        elif not name.endswith(("to_k.weight", "to_v.weight")):
            layout[PREFIX + name] = value
    return layout
