"""Reject variables and arguments whose name does not say what they hold.

    python -m tools.words [FOLDER …]

A name such as `found` or `own` tells how a value was come by, so a reader has to look for the line
that made it. The lint in `.ci/run` calls this for all Python in the repository. Exit code 1 if a
name was rejected, each in a line with its place.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["list_vague_names", "main"]

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("dreambooth_moslora", "toybox", "benchmarks", "tools", "tests")
VAGUE_NAMES = frozenset(
    (
        "found",
        "own",
        "one",
        "ones",
        "words",
        "said",
        "known",
        "given",
        "shown",
        "wanted",
        "other",
        "others",
        "about",
        "named",
        "mine",
        "there",
        "here",
        "both",
        "rest",
        "made",
        "kept",
        "held",
        "left",
        "what",
        "told",
        "asked",
        "meant",
        "seen",
        "taken",
        "drawn",
        "wished",
        "chosen",
        "due",
    )
)
"""Pronouns and participles: none says what a value is."""


def list_vague_names(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and name of each variable or argument of a file that is in VAGUE_NAMES."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        else:
            continue
        if name in VAGUE_NAMES:
            yield node.lineno, name


def main(argv: list[str] | None = None) -> int:
    """Print each vague name with its place and return 1 if there is one, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_folders = [ROOT / name for name in FOLDERS]
    parser.add_argument("folders", nargs="*", type=Path, default=default_folders, metavar="FOLDER")
    args = parser.parse_args(argv)

    rejected_count = 0
    for folder in args.folders:
        for path in sorted(folder.rglob("*.py")):
            for line, name in list_vague_names(path):
                print(f"{path}:{line}: `{name}` does not say what it holds")
                rejected_count += 1
    return int(rejected_count > 0)


if __name__ == "__main__":
    sys.exit(main())
