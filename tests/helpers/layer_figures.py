"""Figures of each layer of a live adapter, by module path."""

from torch import nn

from dreambooth_moslora.adapters.describe import Diagnosis, diagnose
from dreambooth_moslora.adapters.fast_linear import slow_reason
from dreambooth_moslora.adapters.moslora import adapter_layers, matrices_of


def diagnostics(model: nn.Module) -> dict[str, Diagnosis]:
    config = model.peft_config["default"]
    start = getattr(config, "mixer", "none"), getattr(config, "mixer_seed", 0)
    layers = adapter_layers(model).items()
    return {path: diagnose(matrices_of(layer, "default"), *start, path) for path, layer in layers}


def slow_projections(model: nn.Module) -> dict[str, str]:
    """The reason of each layer that cannot be fused."""
    reasons = {path: slow_reason(layer) for path, layer in adapter_layers(model).items()}
    return {path: reason for path, reason in reasons.items() if reason}
