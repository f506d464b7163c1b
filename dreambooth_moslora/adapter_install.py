"""Put an adapter's checked tensors into the pipeline through PEFT: wholly, or not at all.

PEFT gets a configuration that is made here from the tensors: nothing of the file's own settings reaches it.
"""

import re
from collections import Counter
from typing import Any

from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from dreambooth_moslora.adapter_parts import Projection
from dreambooth_moslora.adapter_scales import Scales
from dreambooth_moslora.adapters import AdapterWeights
from dreambooth_moslora.errors import UserError, one_line

__all__ = ["install"]


def install(weights: AdapterWeights, pipeline: StableDiffusionXLPipeline) -> None:
    """Add the adapter to the pipeline's components, under `weights.key`.

    Raises UserError when that fails, with what was already in taken out again.
    """
    try:
        for component, (found, scales) in weights.parts.items():
            _load(component, found, scales, weights.key, pipeline)
    except Exception as error:
        pipeline.delete_adapters(weights.key)
        raise UserError(f"{weights.file_name} could not be put into the base: {one_line(error)}") from error


def _load(component: str, found: dict[str, Projection], scales: Scales, key: str, pipeline) -> None:
    config = {f"{component}.{name}": value for name, value in lora_config(found, scales).items()}
    options = {"network_alphas": None, "adapter_name": key, "metadata": config, "_pipeline": pipeline}
    tensors = _tensors(component, found)
    if component == "unet":
        pipeline.load_lora_into_unet(tensors, unet=pipeline.unet, **options)
    else:
        model = getattr(pipeline, component)
        pipeline.load_lora_into_text_encoder(tensors, text_encoder=model, prefix=component, **options)


def lora_config(found: dict[str, Projection], scales: Scales) -> dict[str, Any]:
    """Arguments of PEFT's LoraConfig."""
    ranks, alphas = {path: p.rank for path, p in found.items()}, scales.alphas
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "target_modules": list(found),
        "use_rslora": scales.use_rslora,
        "use_dora": any(p.magnitude is not None for p in found.values()),
        "lora_bias": any(p.bias is not None for p in found.values()),
    }


def _pattern(values: dict[str, float], common: float) -> dict[str, float]:
    """One regular expression for each value but the common one: PEFT tries all of them on every module."""
    paths: dict[float, list[str]] = {}
    for path, value in values.items():
        paths.setdefault(value, []).append(re.escape(path))
    return {f"^(?:{'|'.join(names)})": value for value, names in paths.items() if value != common}


def _tensors(component: str, found: dict[str, Projection]) -> dict[str, Tensor]:
    """Under the names that diffusers' loader takes: PEFT's for a UNet, its own older ones for a text encoder."""
    down, up = ("lora_A", "lora_B") if component == "unet" else ("lora_linear_layer.down", "lora_linear_layer.up")
    tensors = {}
    for path, projection in found.items():
        parts = {
            f"{down}.weight": projection.down,
            f"{up}.weight": projection.up,
            f"{up}.bias": projection.bias,
            "lora_magnitude_vector.weight": projection.magnitude,
        }
        tensors |= {f"{component}.{path}.{name}": part for name, part in parts.items() if part is not None}
    return tensors
