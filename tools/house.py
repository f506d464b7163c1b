"""Draws the map of the package from its imports: which package imports from which, and the modules of each.

    python -m tools.house [--out assets/pictures/house.png]

A package's floor is one above the highest package that it imports from. Floors and arrows are also printed.
"""

import argparse
import ast
import textwrap
from collections import Counter
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

__all__ = ["arrows_of", "draw", "floors_of", "import_graph", "is_reachable", "package_of", "purpose_of"]

HOME = Path(__file__).resolve().parents[1]
PACKAGE = HOME / "dreambooth_moslora"
OUT = HOME / "assets" / "pictures" / "house.png"
NAMES_A_LINE = 125
"""Characters of the module names in one line of a box."""
INK, FAINT, PAPER = "#1d3557", "#c3cedb", "#f1f5f9"


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--package", type=Path, default=PACKAGE, help="folder of the package to read")
    parser.add_argument("--out", type=Path, default=OUT, help="default: assets/pictures/house.png")
    args = parser.parse_args()
    graph = import_graph(args.package)
    print(report(graph))
    draw(graph, args.package).savefig(args.out, dpi=110)
    print(f"drawn in {args.out}")


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


def arrows_of(graph: dict[str, set[str]]) -> Counter[tuple[str, str]]:
    """{(package, package that it imports from): imports}."""
    arrows: Counter[tuple[str, str]] = Counter()
    for module, targets in graph.items():
        others = [package_of(target) for target in targets if package_of(target) != package_of(module)]
        arrows.update((package_of(module), other) for other in others)
    return arrows


def floors_of(graph: dict[str, set[str]]) -> dict[str, int]:
    """{package: its floor}, lowest first. Raises ValueError when packages import each other in a circle."""
    arrows = arrows_of(graph)
    left = {package_of(module) for module in graph}
    floors: dict[str, int] = {}
    while left:
        ready = {name for name in left if targets_of(name, arrows) <= floors.keys()}
        if not ready:
            raise ValueError(f"these packages import each other: {', '.join(sorted(left))}")
        level = max(floors.values(), default=0) + 1
        floors |= dict.fromkeys(sorted(ready), level)
        left -= ready
    return floors


def targets_of(package: str, arrows: Counter[tuple[str, str]]) -> set[str]:
    return {target for source, target in arrows if source == package}


def report(graph: dict[str, set[str]]) -> str:
    floors, arrows = floors_of(graph), arrows_of(graph)
    levels = len(set(floors.values()))
    lines = [f"{levels} floors, {len(floors)} packages, {len(graph)} files, {len(arrows)} arrows"]
    for name, floor in reversed(floors.items()):
        below = ", ".join(f"{target} ({arrows[name, target]})" for target in sorted(targets_of(name, arrows)))
        lines.append(f"  {floor}  {name:12} imports from {below or 'no other'}")
    return "\n".join(lines)


def is_reachable(start: str, goal: str, arrows: Counter[tuple[str, str]]) -> bool:
    """Whether `goal` can be reached from `start` by at least two arrows, so that a direct arrow is redundant."""
    front = targets_of(start, arrows) - {goal}
    seen: set[str] = set()
    while front:
        seen |= front
        front = {target for source, target in arrows if source in front} - seen
    return goal in seen


def draw(graph: dict[str, set[str]], root: Path) -> Figure:
    """A box for each package, the lowest at the bottom; the arrows on the right point to the imported packages."""
    heights = {name: 0.62 + 0.2 * len(module_lines(graph, name)) for name in floors_of(graph)}
    total = sum(heights.values()) + 0.25 * len(heights)
    figure = Figure(figsize=(11.3, total + 0.3), facecolor="white", layout="constrained")
    axes = figure.add_subplot(xlim=(0, 11.3), ylim=(-0.1, total))
    axes.axis("off")
    middles, y = {}, 0.0
    for name, height in heights.items():
        draw_box(axes, name, graph, root, y, height)
        middles[name] = y + height / 2
        y += height + 0.25
    draw_arrows(axes, arrows_of(graph), middles)
    return figure


def module_lines(graph: dict[str, set[str]], package: str) -> list[str]:
    modules = [name.partition(".")[2] for name in graph if package_of(name) == package]
    modules = [name for name in modules if name.rpartition(".")[2] != "__init__"]
    names = [name.replace(".", "/") for name in modules]
    return textwrap.wrap("   ".join(names), NAMES_A_LINE, break_long_words=False)


def purpose_of(package: str, root: Path) -> str:
    """The first line of the docstring of its `__init__`."""
    text = (root / package / "__init__.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def draw_box(axes, name: str, graph: dict[str, set[str]], root: Path, y: float, height: float) -> None:
    axes.add_patch(FancyBboxPatch((0.1, y), 8.4, height, "round,pad=0,rounding_size=0.1", fc=PAPER, ec=INK))
    axes.text(0.25, y + height - 0.12, name, va="top", size=13, weight="bold", color=INK)
    axes.text(1.75, y + height - 0.15, purpose_of(name, root), va="top", size=8, color=INK)
    look = {"va": "top", "size": 8, "family": "monospace", "color": "#444444", "linespacing": 1.4}
    axes.text(0.25, y + height - 0.47, "\n".join(module_lines(graph, name)), **look)


def draw_arrows(axes, arrows: Counter[tuple[str, str]], middles: dict[str, float]) -> None:
    """Draw redundant arrows faintly, and the others, which make the floors, dark and on top."""
    for source, target in arrows:
        faint = is_reachable(source, target, arrows)
        start, end = (8.5, middles[source] - 0.1), (8.5, middles[target] + 0.1)
        look = {"color": FAINT if faint else INK, "lw": 0.9 if faint else 1.5, "zorder": 1 if faint else 2}
        way = {"connectionstyle": "arc3,rad=-0.45", "arrowstyle": "-|>", "mutation_scale": 11}
        axes.add_patch(FancyArrowPatch(start, end, **way, **look))


if __name__ == "__main__":
    main()
