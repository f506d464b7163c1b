"""Finds the program's own files: the embedded base, sample subjects, recipes, studies, adapters.

In a clone they are in `assets/` beside the package; an installed wheel has them inside the package.
"""

import os
from pathlib import Path

__all__ = ["assets_folder", "clone_folder", "find_asset", "import_environment"]

PACKAGE = Path(__file__).resolve().parents[1]


def clone_folder() -> Path | None:
    """The root of the repository, or None when the program was installed from a wheel."""
    return None if (PACKAGE / "assets").is_dir() else PACKAGE.parent


def assets_folder() -> Path:
    """The folder of `toy-sdxl`, `toy-dino`, `toy-segmenter`, `adapters`, `configs`, `studies` and `subjects`."""
    return (clone_folder() or PACKAGE) / "assets"


def import_environment() -> dict[str, str]:
    """Environment variables that let a child process import this program from any folder: PYTHONPATH in a clone."""
    clone = clone_folder()
    if clone is None:
        return {}
    inherited = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": f"{clone}{os.pathsep}{inherited}" if inherited else str(clone)}


def find_asset(path: str) -> str:
    """A path given by the user, with `~` resolved.

    If `assets/…` does not exist there, it is taken from the program's own files: the README's examples work
    from any folder.
    """
    path = os.path.expanduser(path)
    parts = Path(path).parts
    if parts[:1] != ("assets",) or os.path.exists(path):
        return path
    own = assets_folder().joinpath(*parts[1:])
    return str(own) if own.exists() else path
