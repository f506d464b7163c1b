"""Writes `docs/settings.md`, the list of all settings, from their table.

    python -m tools.settings_table

A test fails while the page differs from the table.
"""

from dataclasses import Field, fields
from pathlib import Path

from dreambooth_moslora.settings.rows import Prompt, Subject
from dreambooth_moslora.settings.table import FIELD_TYPES, GROUPS, TrainConfig

__all__ = ["main", "page"]

OUT = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
HEAD = """# All settings

`python -m tools.settings_table` writes this page from `dreambooth_moslora/settings/table.py`. Each
setting is a flag (`--rank 8`), a name in a `--config` file (`rank = 8`), a field of `TrainConfig`,
and a line of `--help`. The last column says whether a published adapter tells its value, which
`--like` then takes: always, or only if it differs from the default.
"""
COLUMNS = "| flag | values | default | meaning | in published files |\n|---|---|---|---|---|"
KINDS = {
    bool: "switch",
    int: "whole number",
    float: "number",
    str: "text",
    tuple: "names",
    Prompt: "texts",
} | {Subject: "tables"}
TOLD = {"always": "always", "if_changed": "if changed", None: ""}


def main() -> None:
    OUT.write_text(page(), encoding="utf-8")
    print(f"written: {OUT}")


def page() -> str:
    parts = [HEAD]
    for group in GROUPS:
        rows = [row(item) for item in fields(TrainConfig) if item.metadata["group"] == group]
        parts.append("\n".join([f"## {group.capitalize()}\n", COLUMNS, *rows, ""]))
    return "\n".join(parts)


def row(item: Field) -> str:
    facts, default = item.metadata, item.default
    shown = (
        " ".join(default) if isinstance(default, tuple) else "" if default is None else str(default)
    )
    default = (
        "none; `train PHOTOS WORD` chooses" if facts["required"] else f"`{shown}`" if shown else ""
    )
    cells = [f"`--{item.name}`", values(item), default, facts["help"], TOLD[facts["publish"]]]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |"


def values(item: Field) -> str:
    """The choices, or the kind of value and its bounds: `whole number from 1 to 4096`."""
    facts = item.metadata
    if facts["choices"]:
        return ", ".join(f"`{choice}`" for choice in facts["choices"])
    said = {"low": "from", "above": "above", "high": "to", "below": "below"}
    bounds = [f"{word} {facts[name]}" for name, word in said.items() if facts[name] is not None]
    return " ".join(["path" if facts["path"] else KINDS[FIELD_TYPES[item.name][0]], *bounds])


if __name__ == "__main__":
    main()
