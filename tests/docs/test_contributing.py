"""Names in CONTRIBUTING.md, and settings that a run reads."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

from dreambooth_moslora.settings.setting_names import SETTINGS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dreambooth_moslora"
FOLDERS = ("dreambooth_moslora", "toybox", "benchmarks", "tools", "tests")
KEYS_OF_FILES = {"to_out_lora", "modular_model_index"}
"""Parts of an example of a key in LoRA files, and of the name of a file of models."""
ACCEPTED = {"cache_latents", "offload"}
"""Flags of diffusers' script that are accepted, as it is always so."""


def list_names(files: Iterable[Path]) -> set[str]:
    """Return every identifier and every word of a string in Python files, and the files' names."""
    names: set[str] = set()
    for file in files:
        names |= {file.stem, *file.parts}
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    names.add(name)
                case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                    names.add(name)
                case ast.keyword(arg=str(name)):
                    names.add(name)
                case ast.Constant(value=str(text)):
                    names.update(text.split())
    return names


def test_every_name_in_contributing_exists():
    known_names = list_names(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    spans = re.findall(r"`([A-Za-z_][\w.]*)(?:\(\w*\))?`", text)
    parts = {part for span in spans for part in span.split(".") if "_" in part}
    assert len(parts) > 100
    assert parts - known_names - KEYS_OF_FILES == set()


def test_the_map_lists_every_module():
    """The modules of commands share one entry."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| `([a-z/]+)` \| (.*) \|$", text, flags=re.MULTILINE)
    listed = {f"{package}/{name}" for package, row in rows for name in re.findall(r"`(\w+)`", row)}
    modules = {
        path.relative_to(PACKAGE).with_suffix("").as_posix()
        for path in PACKAGE.rglob("*/*.py")
        if path.stem != "__init__" and not path.stem.startswith("command_")
    }
    assert modules == listed


def test_every_setting_is_read():
    """A setting that nothing reads would be accepted and have no effect."""
    table = PACKAGE / "settings" / "setting_rows.py"
    files = set(PACKAGE.rglob("*.py")) - {table, *(PACKAGE / "importers").rglob("*.py")}
    assert SETTINGS.keys() - list_names(files) <= ACCEPTED
