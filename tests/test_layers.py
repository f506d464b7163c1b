"""Layers of the packages: a package imports only from those before it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]
ROOT = HOME / "dreambooth_moslora"
ORDER = [
    "launcher",
    "errors",
    "values",
    "seeds",
    "precision",
    "disk",
    "pictures",
    "settings",
    "importers",
    "photos",
    "base",
    "method",
    "lora",
    "plan",
    "generation",
    "training",
    "evaluation",
    "ui",
    "cli",
    "extras",
]
SIBLINGS = {("photos", "base"), ("base", "photos"), ("ui", "evaluation")}
"""(package, package that it never imports), besides the order."""
LIGHT = {"errors", "values", "seeds", "precision", "disk", "settings"}
"""Packages that import none of HEAVY."""
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate"}
NO_DIFFUSERS = {"method.mixer", "method.moslora", "method.fast_linear", "training.objective"}
ROOMS = sorted(
    {path.parent for top in (ROOT, HOME / "toybox") for path in top.rglob("__init__.py")} - {ROOT}
)
"""Folders of modules: the packages, the folders in them, and those of the toy world."""
MODULES = sorted(p for p in ROOT.rglob("*.py") if not p.name.startswith("__") or p.parent != ROOT)
"""All but the two entry points, which import from all packages."""


def get_module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def find_imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports anywhere, also in functions."""
    prefix, modules = f"{ROOT.name}.", set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and f"{node.module or ''}.".startswith(prefix):
            inner = node.module.removeprefix(ROOT.name).removeprefix(".")
            names = [f"{inner}.{alias.name}".removeprefix(".") for alias in node.names]
            modules |= {name for name in names if is_module(name)} or ({inner} - {""})
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names if alias.name.startswith(prefix)}
            modules |= {name.removeprefix(prefix) for name in names}
    return modules


def is_module(name: str) -> bool:
    return (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()


def get_package(module: str) -> str:
    return module.partition(".")[0]


GRAPH = {get_module_name(path): find_imports(path) for path in MODULES}


def find_reachable(start: str) -> set[str]:
    """Return the modules that importing `start` imports, directly or not."""
    reachable, front = set(), set(GRAPH[start])
    while front:
        reachable |= front
        front = {target for module in front for target in GRAPH.get(module, ())} - reachable
    return reachable


def test_the_packages_are_those_of_the_order():
    assert {get_package(module) for module in GRAPH} == set(ORDER)


@pytest.mark.parametrize("folder", ROOMS, ids=lambda folder: str(folder.relative_to(HOME)))
def test_a_package_describes_itself_and_imports_nothing(folder):
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    assert len(tree.body) == 1 and ast.get_docstring(tree).partition("\n")[0].endswith(".")


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_go_downward_and_in_no_circle(module):
    package = get_package(module)
    siblings = {sibling for name, sibling in SIBLINGS if name == package}
    allowed = set(ORDER[: ORDER.index(package) + 1]) - siblings
    for target in GRAPH[module]:
        assert get_package(target) in allowed, f"{module} imports {target}"
    assert module not in find_reachable(module)


def test_the_page_never_reaches_the_training_loop():
    """The page starts the training command as a process, so that a crash there does not end the
    page."""
    for module in GRAPH:
        if get_package(module) == "ui":
            assert "training.loop" not in find_reachable(module), module


@pytest.mark.parametrize(
    ("start", "limit"), [("- A flag to the loss: ", 7), ("- A photo to its row of the loss: ", 9)]
)
def test_the_documented_path_to_the_loss_is_short_and_connected(start, limit):
    text = (
        (HOME / "CONTRIBUTING.md")
        .read_text(encoding="utf-8")
        .partition(start)[2]
        .partition("\n- ")[0]
    )
    files = re.findall(r"`([\w/]+)\.py`", text.partition("\n\n")[0])
    path_modules = [file.replace("/", ".") for file in files if file != "train_dreambooth"]
    assert len(files) <= limit and path_modules[-1] == "training.objective"
    for number, module in enumerate(path_modules[1:], 1):
        before = path_modules[:number]
        assert GRAPH[module] & set(before) or any(module in GRAPH[name] for name in before), module


@pytest.mark.parametrize("path", MODULES, ids=get_module_name)
def test_heavy_libraries_stay_where_they_belong(path):
    name, text = get_module_name(path), path.read_text(encoding="utf-8")
    roots = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
    assert get_package(name) == "ui" or "gradio" not in roots
    assert name not in NO_DIFFUSERS or "diffusers" not in roots


@pytest.mark.parametrize("package", sorted(LIGHT))
def test_light_packages_import_no_heavy_library(package):
    modules = [f"dreambooth_moslora.{name}" for name in GRAPH if get_package(name) == package]
    code = f"import sys, {', '.join(modules)}; print(*{HEAVY} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""
