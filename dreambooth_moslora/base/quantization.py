"""The frozen base in few bits: 4-bit NormalFloat (QLoRA, Dettmers et al. 2023) or 8-bit weights of bitsandbytes.

Only the linear layers of the transformer blocks are quantised: they hold nine tenths of SDXL's UNet.
"""

import torch
from torch import nn

from dreambooth_moslora.core.errors import UserError

__all__ = ["QUANTIZATIONS", "quantize"]

QUANTIZATIONS = ("none", "nf4", "int8")


def quantize(unet: nn.Module, kind: str, compute_dtype: torch.dtype, device: torch.device | str | None = None) -> int:
    """Replace the layers in place, each quantised on `device` (its own when None); returns how many.

    One dense layer at a time is on the device: the whole dense model never is. `kind` none does nothing.
    Raises UserError for an unknown kind, and when bitsandbytes is not installed.
    """
    if kind not in QUANTIZATIONS:
        raise UserError(f"--base_quantization {kind} is unknown: choose one of {', '.join(QUANTIZATIONS)}.")
    if kind == "none":
        return 0
    targets = [(n, m) for n, m in unet.named_modules() if type(m) is nn.Linear and "transformer_blocks" in n]
    for name, dense in targets:
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, quantized(dense, kind, compute_dtype, device or dense.weight.device))
    return len(targets)


def quantized(dense: nn.Linear, kind: str, compute_dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """One layer (out, in), on `device`."""
    try:
        from bitsandbytes import nn as bnb
    except ImportError as error:
        raise UserError("--base_quantization needs bitsandbytes: pip install bitsandbytes.") from error
    shape = (dense.in_features, dense.out_features, dense.bias is not None)
    if kind == "nf4":
        layer = bnb.Linear4bit(*shape, compute_dtype=compute_dtype, quant_type="nf4")
        layer.weight = bnb.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4")
    else:
        layer = bnb.Linear8bitLt(*shape, has_fp16_weights=False)
        layer.weight = bnb.Int8Params(dense.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias = dense.bias
    return layer.to(device)
