"""The layers of the house are checked here, not promised: a package imports only from those before
it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]
ROOT = HOME / "dreambooth_moslora"
ORDER = [
    "errors",
    "values",
    "seeds",
    "precision",
    "disk",
    "pictures",
    "settings",
    "photos",
    "base",
    "method",
    "lora",
    "plan",
    "generation",
]
ORDER += ["training", "evaluation", "ui", "cli", "extras"]
APART = {("photos", "base"), ("base", "photos"), ("ui", "evaluation")}
"""(package, package that it never imports) beside the order: siblings."""
LIGHT = {"errors", "values", "seeds", "precision", "disk", "settings"}
"""Packages that import none of HEAVY."""
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate"}
NO_DIFFUSERS = {"method.mixer", "method.moslora", "method.fast_linear", "training.objective"}
ROOMS = sorted(
    {path.parent for top in (ROOT, HOME / "toybox") for path in top.rglob("__init__.py")} - {ROOT}
)
"""Folders of modules: the packages, the folders in them, and those of the toy world."""
MODULES = sorted(p for p in ROOT.rglob("*.py") if not p.name.startswith("__") or p.parent != ROOT)
"""But the two doors at the top, which import from all packages."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    """Modules of the package that it imports anywhere, also in functions."""
    prefix, found = f"{ROOT.name}.", set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and f"{node.module or ''}.".startswith(prefix):
            inner = node.module.removeprefix(ROOT.name).removeprefix(".")
            names = [f"{inner}.{alias.name}".removeprefix(".") for alias in node.names]
            found |= {name for name in names if is_module(name)} or ({inner} - {""})
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names if alias.name.startswith(prefix)}
            found |= {name.removeprefix(prefix) for name in names}
    return found


def is_module(name: str) -> bool:
    return (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()


def package_of(module: str) -> str:
    return module.partition(".")[0]


GRAPH = {module_name(path): imports_of(path) for path in MODULES}


def reached_from(start: str) -> set[str]:
    """Modules that are imported by importing `start`, however far down."""
    seen, front = set(), set(GRAPH[start])
    while front:
        seen |= front
        front = {target for module in front for target in GRAPH.get(module, ())} - seen
    return seen


def test_the_packages_are_those_of_the_order():
    assert {package_of(module) for module in GRAPH} == set(ORDER)


@pytest.mark.parametrize("folder", ROOMS, ids=lambda folder: str(folder.relative_to(HOME)))
def test_a_room_says_its_purpose_in_its_first_line_and_imports_nothing(folder):
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    assert len(tree.body) == 1 and ast.get_docstring(tree).partition("\n")[0].endswith(".")


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_go_downward_and_in_no_circle(module):
    package = package_of(module)
    allowed = set(ORDER[: ORDER.index(package) + 1]) - {
        other for one, other in APART if one == package
    }
    for target in GRAPH[module]:
        assert package_of(target) in allowed, f"{module} imports {target}"
    assert module not in reached_from(module)


def test_the_page_never_reaches_the_training_loop():
    """It starts the training command as a process, so that a crash there leaves the page alone."""
    for module in GRAPH:
        if package_of(module) == "ui":
            assert "training.loop" not in reached_from(module), module


@pytest.mark.parametrize(
    ("start", "most"), [("- A flag to the loss: ", 7), ("- A photo to its row of the loss: ", 9)]
)
def test_a_road_to_the_loss_is_short_and_each_file_on_it_hands_to_the_next_ones(start, most):
    text = (
        (HOME / "CONTRIBUTING.md")
        .read_text(encoding="utf-8")
        .partition(start)[2]
        .partition("\n- ")[0]
    )
    files = re.findall(r"`([\w/]+)\.py`", text.partition("\n\n")[0])
    road = [file.replace("/", ".") for file in files if file != "train_dreambooth"]
    assert len(files) <= most and road[-1] == "training.objective"
    for number, module in enumerate(road[1:], 1):
        before = road[:number]
        assert GRAPH[module] & set(before) or any(module in GRAPH[one] for one in before), module


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_heavy_libraries_stay_where_they_belong(path):
    name, text = module_name(path), path.read_text(encoding="utf-8")
    roots = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
    assert package_of(name) == "ui" or "gradio" not in roots
    assert name not in NO_DIFFUSERS or "diffusers" not in roots


@pytest.mark.parametrize("package", sorted(LIGHT))
def test_light_packages_import_no_heavy_library(package):
    modules = [f"dreambooth_moslora.{name}" for name in GRAPH if package_of(name) == package]
    code = f"import sys, {', '.join(modules)}; print(*{HEAVY} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""
