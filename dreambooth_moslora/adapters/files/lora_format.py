"""The matrices and scales of a LoRA file under common names, whichever program wrote it.

Other keys are refused.

<component>.<module path>.<part>  ->  component -> module path -> LowRank

PEFT                              diffusers                          kohya, after diffusers' conversion
to_q.lora_A.weight                to_q.lora.down.weight              processor.to_q_lora.down.weight
q_proj.lora_A.weight              q_proj.lora_linear_layer.down.…    to_q_lora.down.weight
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dreambooth_moslora.adapters.files.metadata import most_common
from dreambooth_moslora.adapters.files.proof import published_name
from dreambooth_moslora.adapters.files.raw_file import COMPONENTS
from dreambooth_moslora.adapters.low_rank import LowRank
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.numbers import is_number

__all__ = ["Part", "Scales", "module_path", "projections", "scales"]

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
    "alpha": "",  # ignored: diffusers and PEFT do not read an alpha under such a name
}
UNET_NAMES = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def projections(tensors: dict[str, Tensor], file_name: str) -> dict[str, dict[str, LowRank]]:
    """Component -> module path as the file writes it -> its matrices down (r, in, …) and up (out, r, …).

    Raises UserError for a key that does not belong to a LoRA, an incomplete pair of matrices, DoRA's magnitudes
    for a part of a component's layers, and NaN or infinity.
    """
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        component, path, field = _place(key, file_name)
        if field:
            _check_numbers(tensor, key, file_name)
            found.setdefault(component, {}).setdefault(path, {})[field] = tensor
    if not found:
        raise UserError(f"{file_name} holds no LoRA projection")
    result = {
        component: {path: _projection(parts, f"{component}.{path}", file_name) for path, parts in paths.items()}
        for component, paths in found.items()
    }
    for component, of_one in result.items():
        if len({projection.magnitude is None for projection in of_one.values()}) > 1:
            raise UserError(f"{file_name} holds DoRA for some layers of its {component} alone, which PEFT cannot load")
    return result


def module_path(component: str, key: str) -> str:
    """The module path in a file's key, without its component: `…attn1.processor.to_q_lora.down.weight` ->
    `…attn1.to_q`.

    A key without a known part is returned as the module path.
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
    """Component, module path and field of LowRank. Raises UserError."""
    component, _, rest = key.partition(".")
    match = _match(rest)
    if component not in COMPONENTS or match is None:
        raise UserError(f"{file_name} is not a LoRA for SDXL: {key!r:.100} does not belong to one")
    groups = match.groupdict()
    return component, module_path(component, rest), FIELDS[groups.get("part") or groups["side"]]


def _check_numbers(tensor: Tensor, key: str, file_name: str) -> None:
    if tensor.dtype not in DTYPES:
        raise UserError(f"{file_name} is broken: {key!r:.100} is in {tensor.dtype}, which is not a dtype of weights")
    if not tensor.float().isfinite().all():
        raise UserError(
            f"{file_name} is broken: {key!r:.100} has values that are NaN, infinite or beyond single precision"
        )


def _projection(parts: dict[str, Tensor], name: str, file_name: str) -> LowRank:
    down, up = parts.get("down"), parts.get("up")
    if down is None or up is None or down.ndim < 2 or up.ndim < 2 or not 0 < down.shape[0] == up.shape[1]:
        raise UserError(f"{file_name} is broken: {name!r:.100} is half there")
    return LowRank(**parts)


LARGEST_ALPHA = 1e6
MOST_VALUES = 200
"""PEFT tries one pattern per value on every module; no trainer writes this many ranks or alphas."""
PEFT_ALPHA = 8
"""PEFT's default when a header has no alpha."""
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base unchanged."""
MODULE_NAME = re.compile(r"\^?\w[\w.]*")


@dataclass(frozen=True)
class Scales:
    """Scales of one component: module path -> alpha, and whether s is alpha/√r (rsLoRA) or alpha/r."""

    alphas: dict[str, float]
    use_rslora: bool = False


Part = tuple[dict[str, LowRank], Scales]
"""Module path -> matrices of one component, and their scales."""


def scales(
    component: str,
    found: dict[str, LowRank],
    network_alphas: dict[str, float] | None,
    peft_metadata: object,
    file_name: str,
) -> Scales:
    """The alphas of one component, from kohya's alphas or PEFT's settings in the header.

    Raises UserError for settings that are not numbers, that contradict the tensors, or that change the base.
    """
    if peft_metadata is not None and not isinstance(peft_metadata, dict):
        raise _broken(file_name, "its LoRA settings are no object")
    if peft_metadata and network_alphas:
        raise _broken(file_name, "it has both alphas and LoRA settings")
    prefix = f"{component}."
    settings = {k.removeprefix(prefix): v for k, v in (peft_metadata or {}).items() if k.startswith(prefix)}
    own = {k.removeprefix(prefix): v for k, v in (network_alphas or {}).items() if k.startswith(prefix)}
    result = _from_settings(component, found, settings, file_name) if settings else _from_alphas(component, found, own)
    for value in result.alphas.values():
        _check_alpha(value, file_name)
    if max(len({p.rank for p in found.values()}), len(set(result.alphas.values()))) > MOST_VALUES:
        raise UserError(f"{file_name} has more than {MOST_VALUES} different ranks or alphas")
    return result


def _from_alphas(component: str, found: dict[str, LowRank], own: dict[str, float]) -> Scales:
    """Scales from kohya's alphas. Without any, alpha equals the rank.

    A layer without an alpha gets the most common one, as in diffusers.
    """
    named = {module_path(component, key.removesuffix(".alpha")): value for key, value in own.items()}
    if not named:
        return Scales({path: projection.rank for path, projection in found.items()})
    common = most_common(named.values())
    return Scales({path: named.get(path, common) for path in found})


def _from_settings(component: str, found: dict[str, LowRank], settings: dict, file_name: str) -> Scales:
    start = settings.get("init_lora_weights", True)
    if not isinstance(start, bool | str | None) or start not in PLAIN_STARTS:
        raise UserError(f"{file_name} goes with a changed base (init_lora_weights {start!r:.40}); export a plain LoRA")
    has_dora = any(projection.magnitude is not None for projection in found.values())
    if _flag(settings, "use_dora", file_name) != has_dora:
        raise _broken(file_name, "its use_dora does not go with its tensors")
    alpha = settings.get("lora_alpha", PEFT_ALPHA)
    find = _finder(settings.get("alpha_pattern") or {}, file_name)
    alphas = {path: find(_names(component, path), alpha) for path in found}
    return Scales(alphas, _flag(settings, "use_rslora", file_name))


def _names(component: str, path: str) -> set[str]:
    """Both names of a module: versions of transformers differ in the prefix `text_model.` of a text encoder."""
    return {path if component == "unet" else path.removeprefix("text_model."), published_name(component, path)[1]}


def _finder(pattern: object, file_name: str) -> Callable[[set[str], float], float]:
    """A function (names of a module, default) -> value of the first entry that equals a name or its end, as
    PEFT chooses.

    An entry that starts with `^` matches only the whole name.
    """
    if not isinstance(pattern, dict):
        raise _broken(file_name, "its alpha_pattern is no object")
    plain = {str(name).replace(r"\.", "."): value for name, value in pattern.items()}
    for name in plain:
        if not MODULE_NAME.fullmatch(name):
            raise _broken(file_name, f"its alpha_pattern {name!r:.60} names no module")
    order = {name: number for number, name in enumerate(plain)}

    def find(names: set[str], default: float) -> float:
        ends = {end for name in names for end in _ends(name)} | {f"^{name}" for name in names}
        return plain[min(ends & order.keys(), key=order.__getitem__)] if ends & order.keys() else default

    return find


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _flag(settings: dict, name: str, file_name: str) -> bool:
    value = settings.get(name, False)
    if not isinstance(value, bool):
        raise _broken(file_name, f"its {name} is {value!r:.40}")
    return value


def _check_alpha(value: object, file_name: str) -> None:
    if not is_number(value) or not abs(value) <= LARGEST_ALPHA:
        raise _broken(file_name, f"it has an alpha of {value!r:.40}")


def _broken(file_name: str, what: str) -> UserError:
    return UserError(f"{file_name} is broken: {what}")
