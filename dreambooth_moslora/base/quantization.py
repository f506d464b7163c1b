"""Quantises the frozen base: 4-bit NormalFloat (QLoRA, Dettmers et al. 2023) or 8-bit weights of bitsandbytes.

Only the linear layers of the transformer blocks are quantised: they hold nine tenths of SDXL's UNet.
"""

import logging

import torch
from torch import nn

from dreambooth_moslora.core.errors import UserError

__all__ = ["QUANTIZATIONS", "quantize"]

QUANTIZATIONS = ("none", "nf4", "int8")
OUTPUTS_A_BLOCK = 32
"""Outputs that the 4-bit kernels for CPUs compute at a time. Every width of SDXL is a multiple."""
CAST_TO_FP16 = "MatMul8bitLt: inputs will be cast"
"""A warning of bitsandbytes at every call in bf16, thousands of times per run."""


def quantize(unet: nn.Module, kind: str, compute_dtype: torch.dtype, device: torch.device | str | None = None) -> int:
    """Replace the layers in place, each quantised on `device` (default: its own); returns how many.

    Only one dense layer at a time is on the device. In 4 bit, each layer then moves back, so that the device is
    free for the encoders. `kind` none does nothing. Raises UserError for an unknown kind, and when bitsandbytes
    is not installed.
    """
    if kind not in QUANTIZATIONS:
        raise UserError(f"--base_quantization {kind} is unknown: choose one of {', '.join(QUANTIZATIONS)}.")
    if kind == "none":
        return 0
    if kind == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(is_worth_saying)
    targets = [(name, module) for name, module in unet.named_modules() if is_target(name, module)]
    for name, dense in targets:
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, quantized(dense, kind, compute_dtype, device or dense.weight.device))
    setattr(unet, MARKS[kind], True)
    return len(targets)


MARKS = {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}
"""PEFT uses these attributes to choose its own layers for bitsandbytes."""


def is_worth_saying(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(CAST_TO_FP16)


def is_target(name: str, module: nn.Module) -> bool:
    in_block = "transformer_blocks" in name
    return in_block and type(module) is nn.Linear and module.out_features % OUTPUTS_A_BLOCK == 0


def quantized(dense: nn.Linear, kind: str, compute_dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """One layer (out, in), on `device`. Raises UserError when bitsandbytes is not installed."""
    try:
        from bitsandbytes import nn as bnb
    except ImportError as error:
        raise UserError("--base_quantization needs bitsandbytes: pip install bitsandbytes.") from error
    shape = (dense.in_features, dense.out_features, dense.bias is not None)
    options = {"device": "meta"}  # the layer's own random weights are not needed
    if kind == "nf4":
        layer = bnb.Linear4bit(*shape, compute_dtype=compute_dtype, quant_type="nf4", **options)
        layer.weight = bnb.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4")
    else:
        layer = bnb.Linear8bitLt(*shape, has_fp16_weights=False, **options)
        layer.weight = bnb.Int8Params(dense.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias = dense.bias
    home = dense.weight.device if kind == "nf4" else device
    return layer.to(device).to(home)
