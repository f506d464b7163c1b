"""kohya's names for an SDXL LoRA, and the header metadata that ComfyUI, A1111 and InvokeAI show.

    lora_unet_<path with _>.lora_down.weight (r, in)   .lora_up.weight (out, r)   .alpha = r
                          [.dora_scale (out, 1)]

ΔW = alpha/r · up·down. If the ranks differ, every module has the alpha of the most common rank, and `up` of the
others is multiplied by r/alpha: diffusers loses the alphas of attention projections when a file has several.
DoRA's W' = dora_scale · (W + ΔW) / ‖W + ΔW‖, with the norm of each row of W, as in PEFT and LyCORIS.
`lora_te1_` and `lora_te2_` are the two text encoders. Header keys: github.com/Stability-AI/ModelSpec, and
`ss_*` of kohya's sd-scripts. Folder names, captions and tag counts, which sd-scripts also writes, are left out.
"""

import torch
from torch import Tensor

from dreambooth_moslora.adapters.files.metadata import AdapterMetadata, most_common
from dreambooth_moslora.adapters.low_rank import LowRank

__all__ = ["DORA_SCALE", "is_by_rows", "kohya_header", "kohya_name", "kohya_tensors"]

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
SDXL_CROSS_ATTENTION = 2048
DORA_SCALE = ".dora_scale"


def is_by_rows(dora_scale: Tensor) -> bool:
    """Whether DoRA's magnitudes are those of W's rows: (out, 1), or (out, 1, 1, 1) of a convolution. Some programs
    write (1, in), for columns."""
    return dora_scale.ndim > 1 and dora_scale.shape[1:].numel() == 1


def kohya_name(component: str, path: str) -> str:
    """`unet`, `mid_block.attentions.0` -> `lora_unet_mid_block_attentions_0`."""
    return f"{PREFIXES[component]}_{path.replace('.', '_')}"


def kohya_tensors(components: dict[str, dict[str, LowRank]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All tensors of the file, with the shapes above; the scale is already in `up`."""
    alpha = common_rank(components)
    tensors = {}
    for component, layers in components.items():
        for path, layer in layers.items():
            name = kohya_name(component, path)
            tensors[f"{name}.lora_down.weight"] = layer.down.to(dtype)
            tensors[f"{name}.lora_up.weight"] = (layer.up * (layer.rank / alpha)).to(dtype)
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha), dtype=dtype)
            if layer.magnitude is not None:
                tensors[f"{name}{DORA_SCALE}"] = layer.magnitude[:, None]
    return tensors


def common_rank(components: dict[str, dict[str, LowRank]]) -> int:
    return most_common(layer.rank for layers in components.values() for layer in layers.values())


def kohya_header(title: str, metadata: AdapterMetadata, components: dict[str, dict[str, LowRank]]) -> dict[str, str]:
    """Title, trigger phrase, architecture and rank. Every value is a string, as safetensors requires."""
    ranks = {layer.rank for layers in components.values() for layer in layers.values()}
    rank = str(*ranks) if len(ranks) == 1 else "Dynamic"  # sd-scripts' word for a file of several ranks
    cross = metadata.structures.get("unet", {}).get("config", {}).get("cross_attention_dim", SDXL_CROSS_ATTENTION)
    is_sdxl = cross == SDXL_CROSS_ATTENTION
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora" if is_sdxl else f"sdxl-like-{cross}/lora",
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
    if is_sdxl:
        header["ss_base_model_version"] = "sdxl_base_v1-0"
    if metadata.resolution_px:
        size = metadata.resolution_px
        header |= {"modelspec.resolution": f"{size}x{size}", "ss_resolution": f"({size}, {size})"}
    return {key: value for key, value in header.items() if value}
