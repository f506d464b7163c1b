"""Writes what the docs say of the program's tables: `docs/settings.md`, the list of all settings,
and the tables between marks in other pages. It writes the types of the public names and of the
settings too, for type checkers and editors.

    python -m tools.tables

A page has `<!-- table: measures -->` before such a table and `<!-- end of table -->` after it. A
test fails while a page differs from the program's tables.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from unittest.mock import patch

import dreambooth_moslora
from dreambooth_moslora.base import devices
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.importers import ai_toolkit, diffusers, kohya, onetrainer, simpletuner
from dreambooth_moslora.importers.rows import Ignored, Row, Table, Unsupported
from dreambooth_moslora.plan import memory_plans
from dreambooth_moslora.plan.base_size import find_base_size
from dreambooth_moslora.plan.defaults import load_recipe
from dreambooth_moslora.plan.memory import estimate_memory
from dreambooth_moslora.settings.family_facts import UNET_SETTINGS
from dreambooth_moslora.settings.field_facts import Prompt, Subject
from dreambooth_moslora.settings.memory_presets import MEMORY_PLANS
from dreambooth_moslora.settings.metric_kinds import METRICS
from dreambooth_moslora.settings.optimizers import OPTIMIZERS
from dreambooth_moslora.settings.parsing import FIELD_TYPES
from dreambooth_moslora.settings.setting_names import GROUPS, get_flag_name, list_flags
from dreambooth_moslora.settings.train_config import TrainConfig

__all__ = ["main", "render_pages", "render_settings"]

DOCS = Path(__file__).resolve().parents[1] / "docs"
PACKAGE = DOCS.parent / "dreambooth_moslora"
TABLE_PATTERN = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
PAGE_HEAD = """# All settings

`python -m tools.tables` writes this page from `dreambooth_moslora/settings/setting_rows.py`. Each
setting is a flag (`--rank 8`), a name in a `--config` file (`rank = 8`), a field of `TrainConfig`,
and a line of `--help`. The last column says whether a published adapter tells its value: always, or
only if it differs from the default.
"""
COLUMNS = ("flag", "values", "default", "meaning", "in published files")
KINDS = {
    bool: "switch",
    int: "whole number",
    float: "number",
    str: "text",
    tuple: "names",
    Prompt: "texts",
} | {Subject: "tables"}
STUB_TYPES = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    tuple: "Sequence[str]",
    Prompt: "Sequence[str]",
} | {Subject: "str | PathLike[str] | Sequence[Mapping[str, Any]]"}
"""Type of a setting -> the values that its argument takes."""
SETTINGS_STUB_HEAD = '''"""Types of the settings as arguments, for type checkers and editors alone.

`python -m tools.tables` writes this file.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, TypedDict

class TrainSettings(TypedDict, total=False):
    base: str | PathLike[str] | None
'''
CARDS_GIB = (8, 12, 16, 24)
HOST_GIB = 32.0
"""Memory of the computer that the table of cards is made for."""
CARD_MODELS = (
    "stabilityai/stable-diffusion-xl-base-1.0",
    "Tongyi-MAI/Z-Image",
    "black-forest-labs/FLUX.1-dev",
    "black-forest-labs/FLUX.2-klein-base-4B",
    "black-forest-labs/FLUX.2-klein-base-9B",
    "Qwen/Qwen-Image-2512",
)
SUBJECT = {
    "instance_data_dir": "photos/dog",
    "instance_prompt": "a photo of a sks dog",
    "class_prompt": "a photo of a dog",
    "with_prior_preservation": True,
}
LISTED_KEYS = 5
"""Keys of another trainer that a row without a counterpart names."""
PLAN_SETTINGS = {name for plan in MEMORY_PLANS.values() for name in plan}
METADATA_WORDS = {"always": "always", "if_changed": "if changed", None: ""}


def main() -> None:
    for page, text in render_pages().items():
        if not page.exists() or text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
            print(f"written: {page}")


def render_pages() -> dict[Path, str]:
    """Each page of the docs -> its text, with its tables made anew."""
    pages = {}
    for page in sorted(DOCS.glob("*.md")):
        pages[page] = TABLE_PATTERN.sub(
            lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}",
            page.read_text(encoding="utf-8"),
        )
    return pages | {
        DOCS / "settings.md": render_settings(),
        PACKAGE / "__init__.pyi": render_public_names(),
        PACKAGE / "settings" / "train_settings.pyi": render_settings_stub(),
    }


def render_public_names() -> str:
    """Return the stub of the package: its public names, and nothing else that an editor offers."""
    modules: dict[str, list[str]] = {}
    for name, module in dreambooth_moslora._PUBLIC_MODULES.items():
        modules.setdefault(f"dreambooth_moslora.{module}", []).append(name)
    lines = ['"""Public names. `python -m tools.tables` writes this file."""', ""]
    for module in sorted(modules):
        lines += [f"from {module} import {name} as {name}" for name in sorted(modules[module])]
    lines += ["", "__version__: str", "__all__ = ["]
    lines += [f'    "{name}",' for name in dreambooth_moslora.__all__]
    return "\n".join([*lines, "]", ""])


def render_settings_stub() -> str:
    """Return the stub of the settings as keyword arguments."""
    lines = []
    for item in fields(TrainConfig):
        kind, is_optional = FIELD_TYPES[item.name]
        hint = STUB_TYPES[kind]
        if item.metadata["path"]:
            hint += " | PathLike[str]"
        lines.append(f"    {item.name}: {hint}{' | None' if is_optional else ''}")
    return "\n".join([SETTINGS_STUB_HEAD.rstrip(), *lines, ""])


def format_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table of Markdown, with an end of line after each row."""
    lines = [" | ".join(columns), " | ".join(["---"] * len(columns))]
    for cells in rows:
        escaped = [cell.replace("|", "\\|").replace("*", "\\*") for cell in cells]
        lines.append(" | ".join(escaped).rstrip(" |"))
    return "\n".join([*lines, ""])


def format_measures() -> str:
    """Format the metrics with the explanations that the reports of an evaluation give."""
    rows = []
    for name, row in METRICS.items():
        if row.help:
            rows.append((row.title, f"`{name}`", row.help, row.better))
    return format_table(("measure", "in `scores.json`", "meaning", "better"), rows)


def format_memory_plans() -> str:
    """Format the plans of `--memory` as the flags that one would give by hand."""
    rows = []
    for name, plan in MEMORY_PLANS.items():
        flags = [
            f"`--{setting}`" if on is True else f"`--{setting} {on}`"
            for setting, on in plan.items()
        ]
        is_of_unets = any(setting in UNET_SETTINGS for setting in plan)
        rows.append((f"`{name}`", " ".join(flags), "" if is_of_unets else "yes"))
    return format_table(("`--memory`", "the same by hand", "for transformers too"), rows)


def format_card_plans() -> str:
    """Format the plan of `train photos/dog dog --base ID --dry_run --vram GIB` for each model and
    card: its name, the share of the blocks that it streams, and its peak, GiB. Beside them are the
    size of the model in half precision, GiB, which is loaded into the host's memory, and the
    recipe's rank and rate.

    The host has `HOST_GIB`, whatever this machine has.
    """
    rows = []
    with patch.object(memory_plans, "measure_host_gib", return_value=HOST_GIB):
        for hub_id in CARD_MODELS:
            plans = [choose_card_plan(hub_id, vram_gib) for vram_gib in CARDS_GIB]
            cells = [f"{plan}, {peak_gib:.1f}" for plan, peak_gib in plans]
            base = Base.find(hub_id)
            host_gib = 2 * find_base_size(base, ()).unet / devices.GIB
            _, recipe = load_recipe(base)
            optimizer = recipe.get("optimizer", "")
            rate = f"{recipe['learning_rate']:g} {optimizer}".strip()
            rows.append((f"`{hub_id}`", *cells, f"{host_gib:.0f}", str(recipe["rank"]), rate))
    cards = [f"{vram_gib} GB" for vram_gib in CARDS_GIB]
    return format_table(("`--base`", *cards, "RAM", "rank", "rate"), rows)


def choose_card_plan(hub_id: str, vram_gib: float) -> tuple[str, float]:
    """Return the plan that `--memory auto` chooses on a card for a subject, with the share of the
    blocks that it streams, and its peak, GiB."""
    base = Base.find(hub_id)
    # The recipe's precision depends on the card too, so the card is assumed before it is read.
    token = devices.assumed_vram_gib.set(vram_gib)
    try:
        _, recipe = load_recipe(base)
        config = TrainConfig.from_dict(recipe | SUBJECT | {"pretrained_model_name_or_path": hub_id})
        settings = memory_plans.choose_memory_settings(config, base, devices.measure_free_gpu_gib())
    finally:
        devices.assumed_vram_gib.reset(token)
    size = find_base_size(base, config.target_modules)
    peak_gib = estimate_memory(replace(config, **settings), size, 1).peak_gib
    plan_settings = {name: value for name, value in settings.items() if name in PLAN_SETTINGS}
    (name,) = [name for name, plan in MEMORY_PLANS.items() if plan == plan_settings]
    share = f" {settings['streamed_share']:.0%}" if "streamed_share" in settings else ""
    return f"`{name}`{share}", peak_gib


def format_trainer_tables(*tables: Table) -> str:
    """Return the rows by which another trainer's keys are translated, below their titles."""
    parts = []
    for table in tables:
        for title, rows in table.items():
            cells = [format_trainer_row(keys.split(), row) for keys, row in rows.items()]
            parts += [f"## {title}\n", format_table(("there", "here", "remark"), cells)]
    return "\n".join(parts)


def format_trainer_row(keys: Sequence[str], row: Row) -> tuple[str, str, str]:
    """Return the cells of a row: keys, counterpart, remark. Of keys without a counterpart the first
    are named, as the command names those that it meets."""
    theirs = ", ".join(f"`{key}`" for key in keys)
    if isinstance(row, (Ignored, Unsupported)) and len(keys) > LISTED_KEYS:
        theirs = ", ".join(f"`{key}`" for key in keys[:LISTED_KEYS])
        theirs += f" and {len(keys) - LISTED_KEYS} more"
    if isinstance(row, Ignored):
        return theirs, "no effect", row.reason
    if isinstance(row, Unsupported):
        harmless = ", ".join(f"`{value}`" for value in row.harmless)
        return theirs, "not supported", row.reason + (f"; {harmless} is" if harmless else "")
    setting = row.setting or keys[0].rpartition(".")[2]
    is_same = all(key == (row.setting or key) for key in keys)
    return theirs, "the same" if is_same else f"`--{get_flag_name(setting)}`", row.remark


def format_optimizers() -> str:
    rows = []
    for name, kind in OPTIMIZERS.items():
        rows.append((f"`{name}`", kind.summary, f"`{kind.package}`" if kind.package else ""))
    return format_table(("`--optimizer`", "about", "package"), rows)


# By the name in the mark of a page.
TABLES = {
    "measures": format_measures,
    "cards": format_card_plans,
    "memory": format_memory_plans,
    "optimizers": format_optimizers,
    "ai_toolkit": lambda: format_trainer_tables(ai_toolkit.DATASET_TABLE, ai_toolkit.TABLE),
    "diffusers": lambda: format_trainer_tables(diffusers.TABLE),
    "kohya": lambda: format_trainer_tables(kohya.TABLE),
    "onetrainer": lambda: format_trainer_tables(onetrainer.CONCEPT_TABLE, onetrainer.TABLE),
    "simpletuner": lambda: format_trainer_tables(simpletuner.DATASET_TABLE, simpletuner.TABLE),
}


def render_settings() -> str:
    parts = [PAGE_HEAD]
    for group in GROUPS:
        rows = [
            format_cells(item) for item in fields(TrainConfig) if item.metadata["group"] == group
        ]
        parts += [f"## {group.capitalize()}\n", format_table(COLUMNS, rows)]
    return "\n".join(parts)


def format_cells(item: Field) -> list[str]:
    """Format the row of a setting."""
    facts, default = item.metadata, item.default
    default_text = (
        " ".join(default) if isinstance(default, tuple) else "" if default is None else str(default)
    )
    default = (
        "none; `train PHOTOS WORD` chooses"
        if facts["required"]
        else f"`{default_text}`"
        if default_text
        else ""
    )
    names = list_flags(item.name) if facts["flag"] else [f"--{item.name}"]
    flags = ", ".join(f"`{name}`" for name in names)
    return [flags, format_values(item), default, facts["help"], METADATA_WORDS[facts["publish"]]]


def format_values(item: Field) -> str:
    """Format the choices, or the kind of value and its bounds: `whole number from 1 to 4096`."""
    facts = item.metadata
    if facts["choices"]:
        return ", ".join(f"`{choice}`" for choice in facts["choices"])
    phrases = {"low": "from", "above": "above", "high": "to", "below": "below"}
    bounds = [f"{word} {facts[name]}" for name, word in phrases.items() if facts[name] is not None]
    return " ".join(["path" if facts["path"] else KINDS[FIELD_TYPES[item.name][0]], *bounds])


if __name__ == "__main__":
    main()
