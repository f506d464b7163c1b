"""Quantises a frozen denoiser in place.

Only the linear layers of the repeated blocks are quantised, to 4-bit NormalFloat (QLoRA, Dettmers
et al. 2023) or to 8-bit weights of bitsandbytes: they hold nine tenths of SDXL's UNet.
"""

import logging

import torch
from torch import nn

from dreambooth_moslora.base.pipelines import block_classes

OUTPUTS_A_BLOCK = 32
"""Outputs that the 4-bit kernels for CPUs compute at a time. It divides every width of SDXL."""
CAST_TO_FP16 = "MatMul8bitLt: inputs will be cast"
"""How a warning begins that bitsandbytes gives at every call in bf16."""
MARKS = {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}
"""Kind of quantisation -> the model's attribute by which PEFT chooses its layers."""


def quantize(
    denoiser: nn.Module,
    kind: str,
    compute_dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> int:
    """Quantise the linear layers of the repeated blocks, in place.

    denoiser: in the CPU's memory, or on a device
    kind: nf4 or int8; with none nothing is done
    compute_dtype: of products with 4-bit weights
    device: where a layer is quantised; by default where it is. In 4 bit each then moves back, which
        frees the device for the encoders

    Returns how many layers were replaced.
    """
    if kind == "none":
        return 0

    # bitsandbytes would warn at every call.
    if kind == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(is_worth_saying)

    # One layer after the other, so that the dense weights need not fit onto the device together.
    count = 0
    for name, dense in layers_of_blocks(denoiser):
        if ".lora_" in name:  # the adapter's own, of a base that has one already
            continue
        if type(dense) is nn.Linear and dense.out_features % OUTPUTS_A_BLOCK == 0:
            layer = quantized(
                dense,
                kind=kind,
                compute_dtype=compute_dtype,
                device=device or dense.weight.device,
            )
            parent, _, child = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), child, layer)
            count += 1

    # PEFT looks here for the class of its own layers.
    setattr(denoiser, MARKS[kind], True)
    return count


def layers_of_blocks(denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of everything inside the repeated blocks."""
    kinds = block_classes(denoiser)
    modules = list(denoiser.named_modules())
    blocks = tuple(f"{name}." for name, module in modules if type(module).__name__ in kinds)

    # A model that lists no blocks is taken to have diffusers' usual ones.
    inside = blocks or "transformer_blocks"
    return [(name, module) for name, module in modules if name.startswith(inside)]


def is_worth_saying(record: logging.LogRecord) -> bool:
    """A filter of bitsandbytes' log."""
    return not str(record.msg).startswith(CAST_TO_FP16)


def quantized(
    dense: nn.Linear, kind: str, compute_dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """One layer (out, in), quantised on `device`."""
    from bitsandbytes import nn as bnb

    # The layer is made on meta, as its own random weights are not needed.
    shape = (dense.in_features, dense.out_features, dense.bias is not None)
    if kind == "nf4":
        layer = bnb.Linear4bit(*shape, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
        layer.weight = bnb.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4")
    else:
        layer = bnb.Linear8bitLt(*shape, has_fp16_weights=False, device="meta")
        layer.weight = bnb.Int8Params(
            dense.weight.data, requires_grad=False, has_fp16_weights=False
        )
    layer.bias = dense.bias

    # bitsandbytes quantises as a weight moves to the device. A weight in 8 bit stays there.
    home = dense.weight.device if kind == "nf4" else device
    return layer.to(device).to(home)
