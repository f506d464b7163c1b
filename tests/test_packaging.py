"""What pyproject.toml declares is what the code imports and what requirements.txt installs; what
needs more says so. In which order tests run."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dreambooth_moslora.settings.optimizers import OPTIMIZERS
from tests.conftest import LONGEST, TESTS, pytest_runtest_setup

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NEEDED = PROJECT["project"]["dependencies"]
SETUPTOOLS = PROJECT["tool"]["setuptools"]
NOT_DECLARED = {"tokenizers"}
"""The first is used where it is there; the second comes with transformers and made the base's
tokenizer."""
EXTRAS = {"cluster": ("fleet", {"ray"}), "serving": ("serve", {"ray", "grpc"})}
"""Package of the program -> the extra that brings what it alone may import."""


def ranges(lines: list[str]) -> dict[str, str]:
    found = [Requirement(line) for line in lines]
    return {item.name.lower().replace("_", "-"): str(item.specifier) for item in found}


def test_requirements_txt_holds_all_that_running_and_testing_need_and_running_needs_no_test_tool():
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert ranges(lines) == ranges(NEEDED + PROJECT["project"]["optional-dependencies"]["test"])
    assert not ranges(NEEDED).keys() & {
        "pytest",
        "pytest-xdist",
        "playwright",
        "ruff",
        "setuptools",
    }


def test_every_package_template_and_the_mark_of_types_are_in_the_wheel():
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
    declared = ranges(NEEDED + extras["optimizers"] + extras["faces"])
    for name in sorted(foreign):
        brought_by = {dist.lower().replace("_", "-") for dist in owners.get(name, [name])}
        assert brought_by & declared.keys(), f"{name} is imported and not declared"


def test_the_package_of_each_optimizer_is_declared_and_ci_installs_it():
    extra = ranges(PROJECT["project"]["optional-dependencies"]["optimizers"])
    packages = {kind.package for kind in OPTIMIZERS.values() if kind.package}
    assert packages <= ranges(NEEDED).keys() | extra.keys()
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert '["optional-dependencies"]["optimizers"]' in ci and "$optimizers" in ci


def test_each_extra_brings_what_its_package_imports():
    names = {"grpc": "grpcio"}
    for extra, libraries in EXTRAS.values():
        brought = ranges(PROJECT["project"]["optional-dependencies"][extra])
        assert {
            names.get(library, library.replace("_", "-")) for library in libraries
        } <= brought.keys()


def test_a_test_is_skipped_where_its_extra_is_missing(request):
    request.node.add_marker(pytest.mark.extra("json", "no_such_module"))
    with pytest.raises(pytest.skip.Exception, match=r"^not installed: no_such_module$"):
        pytest_runtest_setup(request.node)


def test_the_fast_tier_runs_before_any_extra_is_installed_and_what_it_skipped_after_it():
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    steps = re.findall(r"^(?:pip install|python -m pytest).*", text, re.MULTILINE)
    assert steps[:2] == ["pip install -q --no-compile -r requirements.txt", "python -m pytest"]
    assert steps[2].startswith("pip install") and steps[3].startswith(
        'python -m pytest -m "slow or extra"'
    )


def test_each_file_stays_together_the_longest_begin_first_and_then_those_of_most_tests(request):
    paths, long = [item.path for item in request.session.items], [TESTS / name for name in LONGEST]
    changes = [path for path, before in zip(paths, [None, *paths]) if path != before]
    assert len(changes) == len(set(paths)) and all(path.is_file() for path in long)
    expected = [path for path in long if path in changes]
    assert changes[: len(expected)] == expected
    counts = [paths.count(path) for path in changes if str(path.relative_to(TESTS)) not in LONGEST]
    assert counts == sorted(counts, reverse=True)
