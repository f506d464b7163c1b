"""Read another trainer's configuration file: YAML, TOML or JSON of plain values."""

import tomllib
from pathlib import Path
from typing import Any

from dreambooth_moslora.disk.contents import explain_read_error, read_json, read_small_text
from dreambooth_moslora.errors import UserError

YAML_SUFFIXES = (".yaml", ".yml")
MAX_CONFIG_BYTES = 2**20


def read_file(path: Path) -> dict[str, Any]:
    """Return the content of a YAML, TOML or JSON file with its tables. Raises UserError."""
    try:
        if path.suffix.lower() == ".json":
            content = read_json(path)
        elif path.suffix.lower() in YAML_SUFFIXES:
            content = parse_yaml(read_small_text(path, MAX_CONFIG_BYTES))
        else:
            content = tomllib.loads(read_small_text(path, MAX_CONFIG_BYTES))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: {explain_read_error(error)}.") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--config {path}: it cannot be read: {reason}.") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected a table of settings.")
    return content


def parse_yaml(text: str) -> Any:
    """Return the content of YAML of plain values. Raises ValueError, also for tags and for
    aliases, with which a short text can hold billions of values."""
    import yaml

    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("aliases (*name) are not read")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"it is not valid YAML: {error}") from error
