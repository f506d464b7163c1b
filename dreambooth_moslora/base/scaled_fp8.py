"""Weights that a file keeps in eight bits with a scale, as ComfyUI's scaled fp8: W = scale · W8.

Beside `X.weight` in float8 such a file has its scale, `X.scale_weight`, in newer files
`X.weight_scale`, and what ComfyUI's own arithmetic in float8 needs: scales of the inputs, and marks
of the file and of its layers.
"""

import torch
from torch import Tensor

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""The dtypes of scaled weights."""
SCALES = ("scale_weight", "weight_scale")
"""Last parts of the names of the scales."""
NOT_NEEDED = ("scale_input", "input_scale", "comfy_quant", "scaled_fp8")
"""Layers here compute in the run's precision: their inputs are not scaled, and no mark is asked."""


def unscaled(tensors: dict[str, Tensor], dtype: torch.dtype, prefix: str) -> dict[str, Tensor]:
    """The same dictionary, with each scaled weight as its value in `dtype`, and without the scales.

    One weight after the other, so that no second copy of the model is held. In a whole checkpoint
    the names of the denoiser begin with `prefix`: the other parts stay as they are.

    Raises RuntimeError for a scale that does not fit its weight.
    """
    if not any(name.startswith(prefix) for name in tensors):
        prefix = ""
    for name in [name for name in tensors if name.startswith(prefix)]:
        layer, _, kind = name.rpartition(".")
        weight = tensors.get(f"{layer}.weight")

        if kind in NOT_NEEDED:
            del tensors[name]
        elif kind in SCALES and weight is not None and weight.dtype in FLOAT8:
            tensors[f"{layer}.weight"] = product(weight, tensors.pop(name)).to(dtype)
    return tensors


def product(weight: Tensor, scale: Tensor) -> Tensor:
    """Weight (out, in) times its scale, one number or one a row, (out) or (out, 1): fp32, as the
    product is then rounded once. Raises RuntimeError for another shape."""
    missing = weight.ndim - scale.ndim
    return weight.float() * scale.float().reshape(*scale.shape, *(1,) * missing)
