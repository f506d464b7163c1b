"""Quantization of a frozen denoiser, in place.

Only the linear layers of the repeated blocks are quantised, to 4-bit NormalFloat (QLoRA, Dettmers
et al. 2023) by bitsandbytes or to 8 bit (`int8`): they hold nine tenths of SDXL's UNet.
"""

import torch
from torch import nn

from dreambooth_moslora.base.devices import OUTPUTS_PER_BLOCK
from dreambooth_moslora.base.families import list_block_classes
from dreambooth_moslora.base.int8 import Int8Linear


def quantize(
    denoiser: nn.Module,
    kind: str,
    compute_dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> None:
    """Quantise the linear layers of the repeated blocks, in place.

    denoiser: in the host's memory, or on a device
    kind: nf4 or int8; none does nothing
    compute_dtype: of products with the weights
    device: on which each layer is quantised before it moves back; default: the layer's device
    """
    if kind == "none":
        return

    # Free each dense layer before the next is quantised: they need not fit onto the device
    # together, nor beside the packed ones into the host's memory.
    for name in [name for name, _ in list_block_layers(denoiser)]:
        if ".lora_" in name:  # a layer of an adapter that was added before
            continue
        dense = denoiser.get_submodule(name)
        if type(dense) is nn.Linear and dense.out_features % OUTPUTS_PER_BLOCK == 0:
            layer = quantize_layer(
                dense,
                kind=kind,
                compute_dtype=compute_dtype,
                device=device or dense.weight.device,
            )
            parent, _, child = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), child, layer)

    # PEFT chooses the class of its layers by this attribute.
    if kind == "nf4":
        denoiser.is_loaded_in_4bit = True


def list_block_layers(denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
    """List (name, module) of all modules inside the repeated blocks."""
    kinds = list_block_classes(denoiser)
    modules = list(denoiser.named_modules())
    blocks = tuple(f"{name}." for name, module in modules if type(module).__name__ in kinds)

    # For a model that lists no blocks, assume diffusers' usual name.
    prefixes = blocks or "transformer_blocks"
    return [(name, module) for name, module in modules if name.startswith(prefixes)]


def quantize_layer(
    dense: nn.Linear, kind: str, compute_dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """Quantise one layer (out, in) on `device`, and move the result to the layer's device."""
    original_device = dense.weight.device
    if kind == "int8":
        return Int8Linear(dense, compute_dtype, device).to(original_device)
    from bitsandbytes import nn as bnb

    # Create the layer on the meta device, as its random weights are not needed.
    layer = bnb.Linear4bit(
        dense.in_features,
        dense.out_features,
        bias=dense.bias is not None,
        compute_dtype=compute_dtype,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bnb.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4")
    layer.bias = dense.bias

    # bitsandbytes quantises as a weight moves to the device.
    return layer.to(device).to(original_device)
