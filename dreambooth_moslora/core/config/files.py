"""Settings in files: TOML for recipes that people write, JSON for the `train_config.json` of a run."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth_moslora.core.assets import find_asset
from dreambooth_moslora.core.errors import UserError

__all__ = ["load_settings", "read_json_table", "read_tables", "reason_of"]

TOO_DEEP = "it is nested too deeply"


def load_settings(path: Path | str) -> dict[str, Any]:
    """The file's settings by name. Tables are flattened: `[training] seed = 1` becomes `seed = 1`. Raises UserError."""
    try:
        return flatten(read_tables(path), Path(path))
    except RecursionError:
        raise UserError(f"--config {path}: {TOO_DEEP}.") from None


def read_tables(path: Path | str) -> dict[str, Any]:
    """The content of a --config file, with its tables. Raises UserError."""
    path = Path(find_asset(str(path)))
    return parsed(path, f"--config {path}")


def read_json_table(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError."""
    return parsed(path, str(path))


def parsed(path: Path, called: str) -> dict[str, Any]:
    """The file's names and values. Raises UserError for a bad file; the message begins with `called`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{called}: {reason_of(error)}.") from error
    try:
        values = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except ValueError as error:
        kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
        raise UserError(f"{called} is not valid {kind}: {error}.") from error
    except RecursionError:
        raise UserError(f"{called}: {TOO_DEEP}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{called}: expected names and values, found a {type(values).__name__}.")
    return values


def reason_of(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return error.strerror if isinstance(error, OSError) and error.strerror else "it is not a text file"


def flatten(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Nested tables as one table. Raises UserError for a name that is given twice."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = flatten(value, path) if isinstance(value, dict) else {name.replace("-", "_"): value}
        if twice := flat.keys() & inner.keys():
            raise UserError(f"--config {path}: {', '.join(sorted(twice))} is given twice.")
        flat |= inner
    return flat
