"""A companion: a LoRA that lies under the adapter while it is trained, such as one that undoes the
distillation of a base.

    y = (W0 + C)·x + s·B·M·A·x        C = the companion's ΔW, frozen

It is added to the base's weights before these are quantised. So a step costs what it costs without
one, and nothing of it can get into the adapter.
"""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import reader
from dreambooth_moslora.method import moslora
from dreambooth_moslora.method.mixer import LowRank
from dreambooth_moslora.settings.family_facts import get_facts

Layers = dict[str, LowRank]
"""Module path of the denoiser -> the companion's matrices there, with its scale in `up`."""


def read_companion(path: str | Path, pipeline: DiffusionPipeline) -> Layers:
    """The companion in a LoRA file. Raises UserError for another base's, and for more than a plain
    LoRA of the denoiser."""
    weights = reader.read_fitting("--companion", path, pipeline)

    # Of the denoiser alone, as nothing is trained or drawn with other parts changed.
    facts = get_facts(type(pipeline).__name__)
    found = {}
    for component, (layers, scales) in weights.parts.items():
        for name, layer in layers.items():
            is_plain = layer.bias is None and layer.magnitude is None
            if component != facts.denoiser or not is_plain:
                raise UserError(
                    f"--companion {weights.file_name}: give a plain LoRA of {facts.denoiser_name} "
                    f"alone, without DoRA and biases; it has {component}.{name:.100}."
                )
            found[name] = LowRank(layer.down, scales.get_scale(name, layer.rank) * layer.up.float())
    return found


@torch.no_grad()
def add_companion(companion: Layers, denoiser: nn.Module) -> None:
    """Add it to the weights of a dense denoiser, in place. The sums are rounded once."""
    layers = moslora.get_matrix_layers(denoiser)
    for path, matrices in companion.items():
        weight = layers[path].weight
        weight.copy_(weight.float() + matrices.delta.to(weight.device))
