"""PEFT's settings of a LoRA: the alpha and the scale of each layer.

diffusers writes them into a file's header, and PEFT beside its weights.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_moslora.disk.contents import parse_json, read_json
from dreambooth_moslora.disk.run_folder import PEFT_CONFIG_NAME
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import key_names
from dreambooth_moslora.lora.metadata import get_most_common
from dreambooth_moslora.method.mixer import LowRank, compute_scale
from dreambooth_moslora.settings.family_facts import DENOISERS
from dreambooth_moslora.values import is_number

PEFT_SETTINGS_KEY = "lora_adapter_metadata"
"""Key of the settings in the header, as diffusers' scripts for transformers write it."""
MAX_ALPHA = 1e6
"""No training has a larger one: it would be a broken file."""
PEFT_DEFAULT_ALPHA = 8
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""PEFT's initialisations that leave the base unchanged."""
MODULE_NAME_PATTERN = re.compile(r"\^?\w[\w.-]*")
"""An entry of a pattern that names modules. PEFT allows any regular expression there."""


@dataclass(frozen=True)
class Scales:
    """Alphas of the modules, and the rule that turns them into scales."""

    alphas: dict[str, float]  # module path -> alpha
    use_rslora: bool = False  # s is alpha/√r, not alpha/r

    def get_scale(self, path: str, rank: int) -> float:
        """Return the scale s of the module with that path."""
        return compute_scale(self.alphas[path], rank, self.use_rslora)


def build_scales(
    component: str,
    layers: Mapping[str, LowRank],
    alphas: dict[str, float],
    peft_settings: dict,
    file_name: str,
) -> Scales:
    """Return the alphas of one component, from the file's layers or from PEFT's settings.

    component: such as `unet`
    layers: its layers
    alphas: module path -> alpha, as the file's layers have them
    peft_settings: as `component.name` -> value
    file_name: for the message

    Raises UserError for invalid or contradicting settings, and for a file that needs a changed
    base.
    """
    # diffusers refuses this too: one of the two would be ignored.
    if peft_settings and alphas:
        raise make_broken_error(file_name, "it has both alphas and LoRA settings")
    prefix = f"{component}."
    settings = {k.removeprefix(prefix): v for k, v in peft_settings.items() if k.startswith(prefix)}

    # PEFT's settings, or the file's alphas
    if settings:
        start = settings.get("init_lora_weights", True)
        if start not in PLAIN_INITS:
            raise UserError(
                f"{file_name} goes with a changed base (init_lora_weights {start!r:.40}); "
                "export a plain LoRA"
            )
        pattern = settings.get("alpha_pattern") or {}
        alphas = dict.fromkeys(layers, settings.get("lora_alpha", PEFT_DEFAULT_ALPHA))
        alphas |= match_pattern(component, layers, pattern, file_name)
    else:
        # A layer without an alpha gets the most common one, as in diffusers. If no layer has one,
        # alpha is the rank.
        common = get_most_common(alphas.values()) if alphas else None
        alphas = {
            path: alphas.get(path, layer.rank if common is None else common)
            for path, layer in layers.items()
        }

    # A broken file may have any alpha.
    for value in alphas.values():
        if not is_number(value) or not abs(value) <= MAX_ALPHA:
            raise make_broken_error(file_name, f"it has an alpha of {value!r:.40}")
    return Scales(alphas, use_rslora=bool(settings.get("use_rslora")))


def read_header_settings(header: Mapping[str, str], file_name: str) -> dict[str, object]:
    """Return the header's settings, named `component.name`, or `name` for one model; {} if absent.

    Raises UserError for broken ones.
    """
    try:
        return parse_json(header.get(PEFT_SETTINGS_KEY, "{}"), dict[str, Any] | None) or {}
    except UserError as error:
        raise make_broken_error(file_name, f"its LoRA settings: {error}") from error


def read_sidecar_settings(file: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Return the settings that PEFT keeps beside a LoRA with its own keys; {} for any other file.

    Raises UserError for broken ones, and for another kind of adapter.
    """
    config = file.parent / PEFT_CONFIG_NAME
    has_settings = any(key.startswith(key_names.PEFT_PREFIX) for key in keys) and config.is_file()
    if not has_settings:
        return {}
    settings = read_json(config)
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"{file.name} is of PEFT's type {kind!r:.40}, and only LORA is read here")
    return settings


def match_pattern(
    component: str, paths: Iterable[str], pattern: object, file_name: str
) -> dict[str, float]:
    """Return module path -> value of the first entry of a PEFT pattern that fits it.

    component: such as `unet`
    paths: of its modules
    pattern: the end of a module's name, or `^` and a whole name -> value
    file_name: for the message

    Modules that no entry fits are left out. Raises UserError for entries that name no module.
    """
    if not isinstance(pattern, dict):
        raise make_broken_error(file_name, "its alpha_pattern is no object")
    entries = {str(name).replace(r"\.", "."): value for name, value in pattern.items()}
    for name in entries:
        if not MODULE_NAME_PATTERN.fullmatch(name):
            raise make_broken_error(file_name, f"its alpha_pattern {name!r:.60} names no module")

    values = {}
    for path in paths:
        # Versions of transformers differ in the prefix `text_model.` of a text encoder.
        bare_path = path if component in DENOISERS else path.removeprefix("text_model.")
        names = (bare_path, key_names.get_published_path(component, path))
        fitting = (value for entry, value in entries.items() if is_name_match(entry, names))
        value = next(fitting, None)
        if value is not None:
            values[path] = value
    return values


def is_name_match(entry: str, names: Iterable[str]) -> bool:
    """Return whether the entry of a pattern is one of the names, or the end of one."""
    if entry.startswith("^"):
        return entry[1:] in names
    return any(f".{name}".endswith(f".{entry}") for name in names)


def make_broken_error(file_name: str, problem: str) -> UserError:
    """Return the error for a file that no program writes in this form."""
    return UserError(f"{file_name} is broken: {problem}")
