"""Models without weights, for computing with an adapter alone: a few MB for an SDXL UNet.

Every parameter is a single zero, expanded by strides of 0.
"""

import inspect
import json
from collections.abc import Mapping
from importlib import import_module

import torch
from torch import nn

from dreambooth_moslora.errors import UserError, format_error
from dreambooth_moslora.settings.family_facts import FAMILIES

MODEL_LIBRARIES = {facts.model: "diffusers" for facts in FAMILIES}
MODEL_LIBRARIES |= dict.fromkeys(("CLIPTextModel", "CLIPTextModelWithProjection"), "transformers")
"""Class of an adapted model -> its library. The class is read from a file, so no other is built."""
PRIVATE_ENTRIES = (
    "name_or_path",
    "quantization_config",
    "transformers_version",
    "dtype",
    "torch_dtype",
)
"""Entries of a configuration that are not written: where a model came from, how it is stored."""


def get_model_config(model: nn.Module) -> dict[str, object]:
    """Return {"class", "config"} for `build_empty_model`, JSON-able and without file names."""
    # transformers' config can give what differs from its defaults; diffusers' config is a dict.
    config = model.config
    values = config.to_diff_dict() if hasattr(config, "to_diff_dict") else dict(config)
    public = {
        name: value
        for name, value in values.items()
        if not name.startswith("_") and name not in PRIVATE_ENTRIES
    }
    return {"class": type(model).__name__, "config": json.loads(json.dumps(public, default=str))}


def build_empty_model(description: Mapping[str, object]) -> nn.Module:
    """Return the model of a `get_model_config`, with zeros that take no memory.

    Raises UserError for a class that is not in MODEL_LIBRARIES, and for contradictory sizes.
    """
    name, config = description.get("class"), description.get("config")
    if name not in MODEL_LIBRARIES or not isinstance(config, dict):
        raise UserError(
            f"{name!r:.60} is not a part of a model that can be built; "
            f"it has {', '.join(MODEL_LIBRARIES)}"
        )

    try:
        return build_model(str(name), config).eval()
    except Exception as error:  # constructors raise any error on contradictory sizes
        raise UserError(
            f"the {name} that the file describes cannot be built: {format_error(error)}"
        ) from error


def build_model(name: str, config: dict) -> nn.Module:
    """Return a model of that class, in which every parameter is a zero with strides of 0."""
    model_class = getattr(import_module(MODEL_LIBRARIES[name]), name)
    with torch.device("meta"):
        if MODEL_LIBRARIES[name] == "diffusers":
            # The file may come from another version of diffusers, with other entries.
            entries = inspect.signature(model_class.__init__).parameters
            values = {entry: value for entry, value in config.items() if entry in entries}
            model = model_class.from_config(values)
        else:
            # An attention implementation may name a kernel on the hub, which is code: a file must
            # not choose it.
            values = {
                entry: value
                for entry, value in config.items()
                if "attn_implementation" not in entry
            }
            model = model_class(model_class.config_class(**values))

    # Meta tensors cannot compute. Expanded zeros can, and need no memory.
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            zero = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            module._parameters[key] = nn.Parameter(zero, requires_grad=False)
        for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return model
