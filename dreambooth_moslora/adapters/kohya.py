"""The names, tensors and header of a file in kohya's form, for ComfyUI, AUTOMATIC1111, Fooocus and InvokeAI.

    lora_unet_<path with _>.lora_down.weight (r, in)   .lora_up.weight (out, r)   .alpha = r
                          [.dora_scale (out, 1)]

ΔW = alpha/r · up·down. If the ranks differ, every module has the alpha of the most common rank, and `up` of the
others is multiplied by r/alpha: diffusers loses the alphas of attention projections when a file has several.
DoRA's W' = dora_scale · (W + ΔW) / ‖W + ΔW‖, with the norm of each row of W, as in PEFT and LyCORIS. diffusers drops
`dora_scale`, so kohya files with DoRA are evaluated by this definition. Header keys: github.com/Stability-AI/ModelSpec,
and `ss_*` of kohya's sd-scripts, without its folder names, captions and tag counts.
"""

from collections.abc import Collection

import torch

from dreambooth_moslora.adapters.metadata import AdapterMetadata, most_common
from dreambooth_moslora.adapters.mixer import Folded
from dreambooth_moslora.settings.families import DENOISERS, facts_of_model

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}

ALONE = {"text_encoder": "lora_te"}  # Of the one text encoder of Stable Diffusion 1.5.

WIDTHS = (2048, 768)  # of the text in SDXL and in Stable Diffusion 1.5

KOHYA_DOWN, KOHYA_UP, KOHYA_ALPHA, DORA_SCALE = ".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale"


def is_by_rows(dora_scale: torch.Tensor) -> bool:
    """Whether DoRA's magnitudes are of W's rows: (out, 1) or (out, 1, 1, 1). Some programs write (1, in)."""
    return dora_scale.ndim > 1 and dora_scale.shape[1:].numel() == 1


def published_path(component: str, path: str) -> str:
    """The path that other programs know: they keep CLIPTextModel's `text_model.`, which transformers 5 dropped."""
    is_bare = component not in DENOISERS and not path.startswith(("text_model.", "text_projection"))
    return f"text_model.{path}" if is_bare else path


def kohya_name(component: str, path: str, components: Collection[str] = tuple(PREFIXES)) -> str:
    """`unet`, `mid_block.attentions.0` -> `lora_unet_mid_block_attentions_0`, in a file with these components."""
    prefixes = PREFIXES if "text_encoder_2" in components else PREFIXES | ALONE
    return f"{prefixes[component]}_{path.replace('.', '_')}"


def kohya_tensors(components: Folded, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """All tensors of the file, with the shapes above; the scale is already in `up`."""
    alpha = common_rank(components)
    tensors = {}
    for component, layers in components.items():
        for path, layer in layers.items():
            name = kohya_name(component, path, components)
            tensors[f"{name}{KOHYA_DOWN}"] = layer.down.to(dtype)
            tensors[f"{name}{KOHYA_UP}"] = (layer.up * (layer.rank / alpha)).to(dtype)
            tensors[f"{name}{KOHYA_ALPHA}"] = torch.tensor(float(alpha), dtype=dtype)
            if layer.magnitude is not None:
                tensors[f"{name}{DORA_SCALE}"] = layer.magnitude[:, None]
    return tensors


def common_rank(components: Folded) -> int:
    return most_common(layer.rank for layers in components.values() for layer in layers.values())


def kohya_header(title: str, metadata: AdapterMetadata, components: Folded) -> dict[str, str]:
    """Title, trigger phrase, architecture and rank. Every value is a string, as safetensors requires."""
    ranks = {layer.rank for layers in components.values() for layer in layers.values()}
    rank = str(*ranks) if len(ranks) == 1 else "Dynamic"  # sd-scripts' word for a file of several ranks
    config = metadata.structures.get("unet", {}).get("config", {"addition_embed_type": "text_time"})
    facts, cross = facts_of_model("UNet2DConditionModel", config), config.get("cross_attention_dim", WIDTHS[0])
    is_usual = cross in WIDTHS
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{facts.modelspec}/lora" if is_usual else f"{facts.name}-like-{cross}/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": title,
        "modelspec.trigger_phrase": ", ".join(metadata.trigger_words),
        "ss_output_name": title,
        "ss_sd_model_name": metadata.base_id,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": str(common_rank(components)),
        "ss_v2": "False",
    }
    if is_usual:
        header["ss_base_model_version"] = facts.kohya_version
    if metadata.resolution_px:
        size = metadata.resolution_px
        header |= {"modelspec.resolution": f"{size}x{size}", "ss_resolution": f"({size}, {size})"}
    return {key: value for key, value in header.items() if value}
