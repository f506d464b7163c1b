"""Settings from TOML and JSON files, and the recipe in the header of a published file.

The recipe holds the settings of a run that a published adapter file may reveal: numbers, switches,
choices and names of layers, never paths, prompts or text.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth_moslora.disk.contents import explain_read_error, read_json, read_small_text
from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.disk.processes import JOB_CONFIG_NAME
from dreambooth_moslora.disk.run_folder import SETTINGS_NAME
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings.parsing import FIELD_TYPES
from dreambooth_moslora.settings.setting_names import ALIASES, SETTINGS, list_settings
from dreambooth_moslora.settings.train_config import TrainConfig

RUN_SETTINGS_NAMES = (SETTINGS_NAME, JOB_CONFIG_NAME)
"""Files in which a run stores its settings."""


def load_settings(path: Path | str) -> dict[str, Any]:
    """Return the settings of a file by name, its tables flattened: `[training] seed = 1` -> `seed =
    1`.

    Raises UserError.
    """
    return flatten_tables(read_tables(path), Path(path))


def flatten_tables(tables: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the settings of a file's content by name. Raises UserError."""
    try:
        settings = flatten(tables, path)
    except RecursionError as error:
        raise UserError(f"--config {path}: its tables are nested too deep.") from error
    return drop_removed_settings(settings) if path.name in RUN_SETTINGS_NAMES else settings


def drop_removed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's settings without those that only an earlier version had."""
    return {name: value for name, value in settings.items() if name in SETTINGS}


def read_tables(path: Path | str) -> dict[str, Any]:
    """Return the content of a --config file, with its tables. Raises UserError."""
    path = Path(find_asset(str(path)))
    try:
        if path.suffix.lower() == ".json":
            return read_json(path, make_dict=unique_names)
        return tomllib.loads(read_small_text(path))
    except UserError as error:
        raise UserError(f"--config {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: {explain_read_error(error)}.") from error
    except ValueError as error:  # a number of thousands of digits is no TOMLDecodeError
        raise UserError(f"--config {path}: it is not valid TOML: {error}.") from error
    except RecursionError as error:
        raise UserError(f"--config {path}: its tables are nested too deep.") from error


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the names and values of a JSON object as a dict.

    Raises ValueError for a repeated name, as TOML does.
    """
    name, count = Counter(name for name, _ in pairs).most_common(1)[0] if pairs else ("", 1)
    if count > 1:
        raise ValueError(f"{name} is given twice")
    return dict(pairs)


def flatten(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return nested tables as one table. Raises UserError for a repeated setting."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        setting = name.replace("-", "_")
        is_table = isinstance(value, dict)
        inner = flatten(value, path) if is_table else {ALIASES.get(setting, setting): value}
        repeated = flat.keys() & inner.keys()
        if repeated:
            raise UserError(f"--config {path}: {', '.join(sorted(repeated))} is given twice.")
        flat |= inner
    return flat


RECIPE_SETTINGS = list_settings("publish", "always")
"""Settings that every recipe contains."""
CHANGED_RECIPE_SETTINGS = list_settings("publish", "if_changed")
"""Settings that a recipe contains if they differ from the default."""
LAYER_SETTINGS = tuple(name for name in RECIPE_SETTINGS if FIELD_TYPES[name][0] is tuple)
DEFAULTS = TrainConfig().to_dict()
LAYER_NAME = re.compile(r"[A-Za-z0-9_.*\[\]?!-]{1,100}(\s*[=:]\s*[0-9.eE+-]{1,20})?")
"""Name of layers, with a value if it is a pattern. It is too short for the user's text."""


def build_recipe(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of the recipe that are set, as JSON-ready values."""
    settings = config.to_dict()
    for name in LAYER_SETTINGS:
        settings[name] = [text for text in settings[name] if LAYER_NAME.fullmatch(text)]
    if settings["caching"] == "disk":  # the bytes are those of "memory"
        settings["caching"] = DEFAULTS["caching"]
    changed = [name for name in CHANGED_RECIPE_SETTINGS if settings[name] != DEFAULTS[name]]
    return {
        name: settings[name] for name in (*RECIPE_SETTINGS, *changed) if settings[name] is not None
    }
