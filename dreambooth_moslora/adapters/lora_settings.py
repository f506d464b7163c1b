"""PEFT's settings of a LoRA, as diffusers writes them into a file's header: which alpha and scale a layer has."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dreambooth_moslora.adapters import key_names
from dreambooth_moslora.adapters.mixer import nominal_scale
from dreambooth_moslora.core import UserError, is_number
from dreambooth_moslora.settings.families import DENOISERS

PEFT_SETTINGS = "lora_adapter_metadata"  # In the header, as diffusers' scripts for transformers write it
LARGEST_ALPHA = 1e6
PEFT_ALPHA = 8  # PEFT's default when a header has no alpha
MODULE_NAME = re.compile(r"\^?\w[\w.]*")


@dataclass(frozen=True)
class Scales:
    alphas: dict[str, float]  # module path -> alpha
    use_rslora: bool = False  # s is alpha/√r, not alpha/r

    def of(self, path: str, rank: int) -> float:
        return nominal_scale(self.alphas[path], rank, self.use_rslora)


def scales_of_settings(component: str, paths: Iterable[str], settings: dict, file_name: str) -> Scales:
    """The alphas of one component's modules. Raises UserError for settings that are none."""
    paths, alpha, pattern = list(paths), settings.get("lora_alpha", PEFT_ALPHA), settings.get("alpha_pattern") or {}
    alphas = dict.fromkeys(paths, alpha) | matches(component, paths, pattern, file_name)
    return Scales(alphas, flag(settings, "use_rslora", file_name))


def check_alphas(alphas: Mapping[str, object], file_name: str) -> None:
    """Raises UserError for an alpha that is no number, or too large."""
    for value in alphas.values():
        if not is_number(value) or not abs(value) <= LARGEST_ALPHA:
            raise broken(file_name, f"it has an alpha of {value!r:.40}")


def in_header(header: Mapping[str, str], file_name: str) -> dict[str, object]:
    """The header's settings, named `component.name`, or `name` of one model; {} without any. Raises UserError."""
    try:
        found = json.loads(header.get(PEFT_SETTINGS, "{}"))
    except (ValueError, RecursionError) as error:
        raise broken(file_name, "its LoRA settings are not valid JSON") from error
    if not isinstance(found, dict | None):
        raise broken(file_name, "its LoRA settings are no object")
    return found or {}


def matches(component: str, paths: Iterable[str], pattern: object, file_name: str) -> dict[str, float]:
    """Module path -> value of the first entry that is one of its names or the end of one (`^`: a whole name only)."""
    if not isinstance(pattern, dict):
        raise broken(file_name, "its alpha_pattern is no object")
    plain = {str(name).replace(r"\.", "."): value for name, value in pattern.items()}
    for name in plain:
        if not MODULE_NAME.fullmatch(name):
            raise broken(file_name, f"its alpha_pattern {name!r:.60} names no module")
    order, found = {name: number for number, name in enumerate(plain)}, {}
    for path in paths:
        ends = set()
        # Versions of transformers differ in the prefix `text_model.` of a text encoder.
        bare = path if component in DENOISERS else path.removeprefix("text_model.")
        for name in (bare, key_names.published_path(component, path)):
            parts = name.split(".")
            ends |= {f"^{name}", *(".".join(parts[start:]) for start in range(len(parts)))}
        if known := ends & order.keys():
            found[path] = plain[min(known, key=order.__getitem__)]
    return found


def flag(settings: dict, name: str, file_name: str) -> bool:
    value = settings.get(name, False)
    if not isinstance(value, bool):
        raise broken(file_name, f"its {name} is {value!r:.40}")
    return value


def broken(file_name: str, what: str) -> UserError:
    return UserError(f"{file_name} is broken: {what}")
