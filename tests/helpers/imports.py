"""Which modules of the package import which, read from their sources."""

import ast
from pathlib import Path


def import_graph(root: Path) -> dict[str, set[str]]:
    """{module: modules of the package that it imports anywhere, also in functions}, such as "core.config.fields".

    `__init__.py` and `__main__.py` at the top of `root` are left out, as they import from all packages.
    """
    doors = {root / "__init__.py", root / "__main__.py"}
    files = sorted(path for path in root.rglob("*.py") if path not in doors)
    return {module_name(path, root): imports_of(path, root) for path in files}


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


def imports_of(path: Path, root: Path) -> set[str]:
    prefix = f"{root.name}."
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and f"{node.module or ''}.".startswith(prefix):
            inner = node.module.removeprefix(root.name).removeprefix(".")
            names = [f"{inner}.{alias.name}".removeprefix(".") for alias in node.names]
            found |= {name for name in names if is_module(name, root)} or ({inner} - {""})
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names if alias.name.startswith(prefix)}
            found |= {name.removeprefix(prefix) for name in names}
    return found


def is_module(name: str, root: Path) -> bool:
    return (root / name.replace(".", "/")).with_suffix(".py").is_file()


def package_of(module: str) -> str:
    return module.partition(".")[0]
