"""Read another trainer's configuration file: YAML, TOML or JSON of plain values."""

from pathlib import Path
from typing import Any

from dreambooth_moslora.disk.contents import explain_read_error, read_small_text
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import config_files

YAML_SUFFIXES = (".yaml", ".yml")
MAX_YAML_BYTES = 2**20
"""YAML is read slowly."""


def read_file(path: Path) -> dict[str, Any]:
    """Return the content of a YAML, TOML or JSON file with its tables. Raises UserError."""
    if path.suffix.lower() not in YAML_SUFFIXES:
        return config_files.read_tables(path)
    try:
        content = parse_yaml(read_small_text(path, MAX_YAML_BYTES))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: {explain_read_error(error)}.") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--config {path}: it cannot be read: {reason}.") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected a table of settings.")
    return content


def parse_yaml(text: str) -> Any:
    """Return the content of YAML of plain values. Raises ValueError, also for tags, for a name that
    is given twice, and for aliases, with which a short text can hold billions of values."""
    import yaml

    class PlainLoader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("aliases (*name) are not read")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            pairs = [(str(key.value), None) for key, _ in node.value]
            config_files.unique_names(pairs)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader=PlainLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"it is not valid YAML in line {line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"it is not valid YAML: {error}") from error
