"""Lists the layers of a model that can have an adapter, and those that a config names, by PEFT's own rule."""

import math
import re
from collections.abc import Iterator, Mapping

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

__all__ = ["base_modules", "matrix_layers", "narrowest_sides", "target_layers", "value_pattern", "without_wrapper"]


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model that `peft.get_peft_model` was given."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Module path -> module, in the model's order, as without PEFT's wrappers.

    A shared module is listed under its first path only; the model itself is left out.
    """
    modules, seen = {}, set()
    for path, module in _walk(without_wrapper(model), ""):
        if module not in seen:
            seen.add(module)
            modules[path] = module
    return modules


def _walk(parent: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in parent.named_children():
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        yield f"{prefix}{name}", module
        yield from _walk(module, f"{prefix}{name}.")


def matrix_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The `base_modules` whose weight has at least 2 dimensions: projections, convolutions and embeddings."""
    layers = {}
    for path, module in base_modules(model).items():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim > 1:
            layers[path] = module
    return layers


def target_layers(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The `base_modules` that `config.target_modules` matches, whether or not they can have an adapter."""
    modules = base_modules(model)
    return {path: module for path, module in modules.items() if LoraModel._check_target_module_exists(config, path)}


def value_pattern(values: dict[str, float], common: float) -> dict[str, float]:
    """PEFT's `rank_pattern` or `alpha_pattern`: module path -> value, for the values other than `common`.

    It has one regular expression per value, because PEFT tries all of them on every module.
    """
    paths: dict[float, list[str]] = {}
    for path, value in values.items():
        paths.setdefault(value, []).append(re.escape(path))
    return {f"^(?:{'|'.join(names)})": value for value, names in paths.items() if value != common}


def narrowest_sides(layers: Mapping[str, nn.Module]) -> dict[str, int]:
    """The fewer of each layer's inputs and outputs. A convolution's inputs count once per position of its kernel."""
    found = {}
    for path, layer in layers.items():
        if isinstance(layer, nn.Conv2d):
            found[path] = min(layer.out_channels, layer.in_channels * math.prod(layer.kernel_size))
        else:
            found[path] = min(layer.out_features, layer.in_features)
    return found
