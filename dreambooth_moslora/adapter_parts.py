"""The parts of a LoRA file under one name each, whichever program wrote it; anything that is no such part is refused.

<component>.<module path>.<part>  ->  component -> module path -> Projection

PEFT                              diffusers                          kohya, after diffusers' conversion
to_q.lora_A.weight                to_q.lora.down.weight              processor.to_q_lora.down.weight
q_proj.lora_A.weight              q_proj.lora_linear_layer.down.…    to_q_lora.down.weight
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from dreambooth_moslora.adapter_file import COMPONENTS
from dreambooth_moslora.errors import UserError

__all__ = ["Projection", "module_path", "projections"]

PEFT_KEY = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector(\.weight)?|alpha)"
)
OLD_KEY = re.compile(
    r"(?P<path>.+?)\.((?P<projection>to_q|to_k|to_v|to_out)_lora|lora|lora_linear_layer)"
    r"\.(?P<side>down\.weight|up\.weight|up\.bias)"
)
FIELDS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "down.weight": "down",
    "up.weight": "up",
    "up.bias": "bias",
    "alpha": "",  # diffusers and PEFT leave an alpha under such a name unread, and so do we
}
UNET_NAMES = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@dataclass(frozen=True)
class Projection:
    """down (r, in), up (out, r) of a linear layer, (r, in, h, w) and (out, r, 1, 1) of a convolution.

    `bias` (out,) is up's own; `magnitude` (out,) is DoRA's.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def projections(tensors: dict[str, Tensor], file_name: str) -> dict[str, dict[str, Projection]]:
    """Component -> module path as the file writes it -> Projection.

    Raises UserError for a key that is no part of a LoRA, a matrix without its other half, and what is no finite number.
    """
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        component, path, field = _place(key, file_name)
        if field:
            _check_numbers(tensor, key, file_name)
            found.setdefault(component, {}).setdefault(path, {})[field] = tensor
    if not found:
        raise UserError(f"{file_name} holds no LoRA projection")
    return {
        component: {path: _projection(parts, f"{component}.{path}", file_name) for path, parts in paths.items()}
        for component, paths in found.items()
    }


def module_path(component: str, key: str) -> str:
    """The module that a key is about, without its component: `…attn1.processor.to_q_lora.down.weight` -> `…attn1.to_q`.

    A key that names no part is taken for the module itself.
    """
    match = _match(key)
    if match is None:
        return key.replace(".processor.", ".")
    old = match.groupdict().get("projection")
    names = UNET_NAMES if component == "unet" else TEXT_NAMES
    return f"{match['path']}.{names[old]}" if old else match["path"]


def _match(key: str) -> re.Match[str] | None:
    key = key.replace(".processor.", ".")
    return PEFT_KEY.fullmatch(key) or OLD_KEY.fullmatch(key)


def _place(key: str, file_name: str) -> tuple[str, str, str]:
    """Component, module path and field of Projection."""
    component, _, rest = key.partition(".")
    match = _match(rest)
    if component not in COMPONENTS or match is None:
        raise UserError(f"{file_name} is not a LoRA for SDXL: {key!r:.100} is no part of one")
    groups = match.groupdict()
    return component, module_path(component, rest), FIELDS[groups.get("part") or groups["side"]]


def _check_numbers(tensor: Tensor, key: str, file_name: str) -> None:
    if tensor.dtype not in DTYPES:
        raise UserError(f"{file_name} is broken: {key!r:.100} is in {tensor.dtype}, which is no dtype of weights")
    if not tensor.isfinite().all():
        raise UserError(f"{file_name} is broken: {key!r:.100} has NaN or infinite values")


def _projection(parts: dict[str, Tensor], name: str, file_name: str) -> Projection:
    down, up = parts.get("down"), parts.get("up")
    if down is None or up is None or down.ndim < 2 or up.ndim < 2 or not 0 < down.shape[0] == up.shape[1]:
        raise UserError(f"{file_name} is broken: {name!r:.100} is half there")
    return Projection(**parts)
