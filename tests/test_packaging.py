"""Declared packages: pyproject.toml declares what the code imports."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from dreambooth_moslora.settings.optimizers import OPTIMIZERS
from tests.conftest import (
    LONGEST,
    TESTS,
    pytest_collection_modifyitems,
    pytest_runtest_setup,
)

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DEPENDENCIES = PROJECT["project"]["dependencies"]
SETUPTOOLS = PROJECT["tool"]["setuptools"]
NOT_DECLARED = {"tokenizers"}
"""Comes with transformers."""
EXTRAS = {"cluster": ("fleet", {"ray"}), "serving": ("serve", {"ray", "grpc"})}
"""Package of the program -> its extra, and the modules that it alone may import."""


def parse_ranges(lines: list[str]) -> dict[str, str]:
    """Return package -> range of versions."""
    requirements = map(Requirement, lines)
    return {item.name.lower().replace("_", "-"): str(item.specifier) for item in requirements}


def test_requirements_txt_equals_what_running_and_testing_need():
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert parse_ranges(lines) == parse_ranges(
        DEPENDENCIES + PROJECT["project"]["optional-dependencies"]["test"]
    )
    assert not parse_ranges(DEPENDENCIES).keys() & {
        "pytest",
        "pytest-xdist",
        "playwright",
        "ruff",
        "setuptools",
    }


def test_every_package_and_template_is_in_the_wheel():
    """Type checkers read the annotations of an installed package only if it has `py.typed`."""
    folder = ROOT / "dreambooth_moslora"
    names = {".".join(file.parent.relative_to(ROOT).parts) for file in folder.rglob("__init__.py")}
    assert set(SETUPTOOLS["packages"]) == names | {"dreambooth_moslora.assets"}
    packed = {
        file for pattern in SETUPTOOLS["package-data"][folder.name] for file in folder.glob(pattern)
    }
    assert packed == {
        file for file in folder.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    assert folder / "py.typed" in packed and len(packed) > 5


@pytest.mark.parametrize("folder", ["dreambooth_moslora", "toybox"])
def test_every_package_that_is_imported_is_declared(folder):
    imported = set()
    for path in (ROOT / folder).rglob("*.py"):
        extra = EXTRAS.get(path.parent.name, ("", set()))[1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                imported |= {node.module.partition(".")[0]} - extra
            elif isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names} - extra
    foreign = imported - sys.stdlib_module_names - {"dreambooth_moslora", "toybox"} - NOT_DECLARED
    owners = {"cv2": ["opencv-python-headless"]} | packages_distributions()
    extras = PROJECT["project"]["optional-dependencies"]
    declared = parse_ranges(DEPENDENCIES + extras["optimizers"] + extras["faces"])
    for name in sorted(foreign):
        brought_by = {dist.lower().replace("_", "-") for dist in owners.get(name, [name])}
        assert brought_by & declared.keys(), f"{name} is imported and not declared"


def test_the_package_of_each_optimizer_is_declared():
    extra = parse_ranges(PROJECT["project"]["optional-dependencies"]["optimizers"])
    packages = {kind.package for kind in OPTIMIZERS.values() if kind.package}
    assert packages <= parse_ranges(DEPENDENCIES).keys() | extra.keys()


def test_each_extra_brings_what_its_package_imports():
    names = {"grpc": "grpcio"}
    for extra, libraries in EXTRAS.values():
        brought = parse_ranges(PROJECT["project"]["optional-dependencies"][extra])
        assert {
            names.get(library, library.replace("_", "-")) for library in libraries
        } <= brought.keys()


def test_a_test_is_skipped_where_its_extra_is_missing(request):
    request.node.add_marker(pytest.mark.extra("json", "no_such_module"))
    with pytest.raises(pytest.skip.Exception, match=r"^not installed: no_such_module$"):
        pytest_runtest_setup(request.node)


def test_the_longest_files_run_first():
    names = ["docs/test_pages.py", "docs/test_pages.py", "test_layers.py", *reversed(LONGEST)]
    items = [SimpleNamespace(path=TESTS / name) for name in names]
    pytest_collection_modifyitems(items)
    assert all(item.path.is_file() for item in items)
    assert [item.path for item in items[: len(LONGEST)]] == [TESTS / name for name in LONGEST]
    assert [item.path.name for item in items[len(LONGEST) :]] == ["test_pages.py"] * 2 + [
        "test_layers.py"
    ]
