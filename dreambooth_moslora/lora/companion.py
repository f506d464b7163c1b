"""Companion: a frozen LoRA under the adapter that is trained, such as one that undoes the
distillation of a base.

    y = (W0 + C)·x + s·B·M·A·x        C = the companion's ΔW, frozen

It is added to the base's weights before these are quantised. A step therefore costs as much as
without a companion, and the companion is not part of the exported adapter.
"""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import reader
from dreambooth_moslora.lora.reader import Layers
from dreambooth_moslora.method import moslora
from dreambooth_moslora.method.mixer import LowRank
from dreambooth_moslora.settings.family_facts import get_facts


def read_companion(path: str | Path, pipeline: DiffusionPipeline) -> Layers:
    """Return the companion's layers from a LoRA file, with the scale in `up`.

    Raises UserError if the file does not fit the base, or is more than a plain LoRA of the
    denoiser.
    """
    weights = reader.read_fitting("--companion", path, pipeline)

    # Only the denoiser may be changed: training and sampling leave the other models as they are.
    facts = get_facts(type(pipeline).__name__)
    companion = {}
    for component, (layers, scales) in weights.parts.items():
        for name, layer in layers.items():
            is_plain = layer.bias is None and layer.magnitude is None
            if component != facts.denoiser or not is_plain:
                raise UserError(
                    f"--companion {weights.file_name}: give a plain LoRA of {facts.denoiser_name} "
                    f"alone, without DoRA and biases; it has {component}.{name:.100}."
                )
            companion[name] = LowRank(
                layer.down, scales.get_scale(name, layer.rank) * layer.up.float()
            )
    return companion


@torch.no_grad()
def add_companion(companion: Layers, denoiser: nn.Module) -> None:
    """Add the companion to the weights of a dense denoiser in place, rounding each sum once."""
    layers = moslora.get_matrix_layers(denoiser)
    for path, matrices in companion.items():
        weight = layers[path].weight
        weight.copy_(weight.float() + matrices.delta.to(weight.device))
