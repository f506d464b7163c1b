"""A model without weights: every parameter is a single zero, expanded to full size by strides of 0.

Loaders, including PEFT's, treat it as an ordinary fp32 model on the CPU, but it takes almost no memory: a few
MB for an SDXL UNet. The stock loader reloads an export into it, so that memory holds only one real UNet.
"""

import inspect
import json
from collections.abc import Mapping
from importlib import import_module
from math import prod

import torch
from torch import nn

from dreambooth_moslora.core.errors import UserError, one_line

__all__ = ["empty_model", "model_config"]


def model_config(model: nn.Module) -> dict[str, object]:
    """{"class", "config"}, JSON-able and without file names, for `empty_model`."""
    config = model.config
    values = config.to_diff_dict() if hasattr(config, "to_diff_dict") else dict(config)
    values = {k: v for k, v in values.items() if not k.startswith("_") and k not in PRIVATE}
    return {"class": type(model).__name__, "config": json.loads(json.dumps(values, default=str))}


CLASSES = {
    "UNet2DConditionModel": "diffusers",
    "CLIPTextModel": "transformers",
    "CLIPTextModelWithProjection": "transformers",
}
"""Class of an adapted model -> its library. A file names the class, so no other class is ever built."""
MOST_LAYERS = 2000
"""Most layers of all blocks together, if each were as deep as the deepest. SDXL's UNet has 60, its text
encoders have 12 and 32."""
DEPTHS = ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers")
PRIVATE = ("name_or_path", "quantization_config", "transformers_version", "dtype", "torch_dtype")


def empty_model(description: Mapping[str, object]) -> nn.Module:
    """The model of a `model_config`, with zeros for weights, which take no memory.

    Raises UserError for a class that is not part of SDXL, and for a config that cannot be built.
    """
    name, config = description.get("class"), description.get("config")
    if name not in CLASSES or not isinstance(config, dict):
        raise UserError(f"{name!r:.60} is not a part of SDXL that can be built; it has {', '.join(CLASSES)}")
    if layers_in(config) > MOST_LAYERS:
        raise UserError(f"the {name} that the file describes has more than {MOST_LAYERS} layers, so it is not SDXL's")
    try:
        with torch.device("meta"):
            model = build(str(name), config)
        fill_with_zeros(model)
    except Exception as error:  # constructors raise any error on contradictory sizes
        raise UserError(f"the {name} that the file describes cannot be built: {one_line(error)}") from error
    return model.eval()


def layers_in(config: dict) -> int:
    """The most layers that a model of this config can have; the constructor judges unreadable numbers."""
    blocks = config.get("down_block_types")
    return (len(blocks) if isinstance(blocks, list) else 1) * prod(deepest(config.get(name)) for name in DEPTHS)


def deepest(depths: object) -> int:
    """The largest number in a number or a list, nested or not; 1 for anything else."""
    if isinstance(depths, list):
        return max(map(deepest, depths), default=1)
    return max(1, depths) if isinstance(depths, int) else 1


def build(name: str, config: dict) -> nn.Module:
    kind = getattr(import_module(CLASSES[name]), name)
    if CLASSES[name] == "diffusers":
        return kind.from_config(known(kind, config))
    # An attention implementation may name a kernel on the hub, which is code: a file must not choose it.
    return kind(kind.config_class(**{k: v for k, v in config.items() if "attn_implementation" not in k}))


def known(kind: type, config: dict) -> dict:
    """The arguments that this version of the class has."""
    names = inspect.signature(kind.__init__).parameters
    return {key: value for key, value in config.items() if key in names}


def fill_with_zeros(model: nn.Module) -> None:
    """Replace every parameter by a zero with strides of 0, in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zero = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(zero, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
