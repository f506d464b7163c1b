"""Where settings come from: TOML and JSON files; and where they go: the recipe in the header of a
published file.

The recipe of a run is what a published adapter file tells of its settings: numbers, switches,
choices and names of layers, never paths, prompts or words.
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
from dreambooth_moslora.settings.train_config import (
    ALIASES,
    FIELD_TYPES,
    SETTINGS,
    TrainConfig,
    list_settings,
)

RUN_SETTINGS_NAMES = (SETTINGS_NAME, JOB_CONFIG_NAME)
"""Files of settings that runs keep."""


def load_settings(path: Path | str) -> dict[str, Any]:
    """The file's settings by name. Tables are flattened: `[training] seed = 1` becomes `seed = 1`.
    Raises UserError."""
    path = Path(path)
    try:
        settings = flatten(read_tables(path), path)
    except RecursionError as error:
        raise UserError(f"--config {path}: its tables are nested too deep.") from error
    return drop_removed_settings(settings) if path.name in RUN_SETTINGS_NAMES else settings


def drop_removed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, which may be of an earlier version, without those that are gone."""
    return {name: value for name, value in settings.items() if name in SETTINGS}


def read_tables(path: Path | str) -> dict[str, Any]:
    """The content of a --config file, with its tables. Raises UserError."""
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


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the names and values of a JSON object as a table. Raises ValueError for a name that is
    there twice, as TOML does."""
    name, count = Counter(name for name, _ in pairs).most_common(1)[0] if pairs else ("", 1)
    if count > 1:
        raise ValueError(f"{name} is given twice")
    return dict(pairs)


def flatten(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Nested tables as one table. Raises UserError for a setting that is given twice."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        is_table = isinstance(value, dict)
        plain = name.replace("-", "_")
        inner = flatten(value, path) if is_table else {ALIASES.get(plain, plain): value}
        twice = flat.keys() & inner.keys()
        if twice:
            raise UserError(f"--config {path}: {', '.join(sorted(twice))} is given twice.")
        flat |= inner
    return flat


# The settings that every recipe tells, and those that it tells if they differ from the default.
RECIPE_SETTINGS = list_settings("publish", "always")
CHANGED_RECIPE_SETTINGS = list_settings("publish", "if_changed")
LAYER_SETTINGS = tuple(name for name in RECIPE_SETTINGS if FIELD_TYPES[name][0] is tuple)
DEFAULTS = TrainConfig().to_dict()
# A name of layers, with a value if it is a pattern. It cannot hold text of the user's.
LAYER_NAME = re.compile(r"[A-Za-z0-9_.*\[\]?!-]{1,100}(\s*[=:]\s*[0-9.eE+-]{1,20})?")


def build_recipe(config: TrainConfig) -> dict[str, Any]:
    """JSON-ready values of the settings in RECIPE that are set."""
    settings = config.to_dict()
    for name in LAYER_SETTINGS:
        settings[name] = [text for text in settings[name] if LAYER_NAME.fullmatch(text)]
    if settings["caching"] == "disk":  # the bytes are those of "memory"
        settings["caching"] = DEFAULTS["caching"]
    changed = [name for name in CHANGED_RECIPE_SETTINGS if settings[name] != DEFAULTS[name]]
    return {
        name: settings[name] for name in (*RECIPE_SETTINGS, *changed) if settings[name] is not None
    }
