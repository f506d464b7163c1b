"""How strongly each projection of a LoRA file acts: s = alpha / r, or alpha / sqrt(r) for rsLoRA.

alpha stands in kohya's own tensors, or in the settings of PEFT that diffusers writes into the header. Of those settings
only the ones that belong to this formula are read, as numbers and module names: PEFT itself would run the names as
regular expressions, and some of the other settings rewrite the base.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from dreambooth_moslora.adapter_parts import Projection, module_path
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.proof import published_name

__all__ = ["Part", "Scales", "scales"]

LARGEST_ALPHA = 1e6
MOST_VALUES = 200
"""PEFT tries one pattern a value on every module; no trainer writes that many ranks or alphas."""
PEFT_ALPHA = 8
"""What PEFT takes where a header names no alpha."""
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base as it is."""
MODULE_NAME = re.compile(r"\^?\w[\w.]*")


@dataclass(frozen=True)
class Scales:
    """Of one component: alpha per module path, and the rule."""

    alphas: dict[str, float]
    use_rslora: bool = False


Part = tuple[dict[str, Projection], Scales]
"""One component's projections by module path, and their scales."""


def scales(
    component: str,
    found: dict[str, Projection],
    network_alphas: dict[str, float] | None,
    peft_metadata: object,
    file_name: str,
) -> Scales:
    """Raises UserError for settings that are no numbers, contradict the tensors or ask for another base."""
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


def _from_alphas(component: str, found: dict[str, Projection], own: dict[str, float]) -> Scales:
    """kohya's alphas. Without any, alpha is the rank; a projection that has none gets the commonest as in diffusers."""
    named = {module_path(component, key.removesuffix(".alpha")): value for key, value in own.items()}
    if not named:
        return Scales({path: projection.rank for path, projection in found.items()})
    commonest = Counter(named.values()).most_common(1)[0][0]
    return Scales({path: named.get(path, commonest) for path in found})


def _from_settings(component: str, found: dict[str, Projection], settings: dict, file_name: str) -> Scales:
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
    """A text encoder's modules are called with and without `text_model.` by different versions of transformers."""
    return {path if component == "unet" else path.removeprefix("text_model."), published_name(component, path)[1]}


def _finder(pattern: object, file_name: str) -> Callable[[set[str], float], float]:
    """(names of a module, default) -> the value of the first entry that is one of them or their end, as PEFT chooses.

    `^` at an entry's start: only the whole name counts.
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
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_ALPHA:
        raise _broken(file_name, f"it has an alpha of {value!r:.40}")


def _broken(file_name: str, what: str) -> UserError:
    return UserError(f"{file_name} is broken: {what}")
