"""Paths: the program's assets, caches, the user's files, public names."""

import os
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parents[1]
"""Folder of the program's modules."""


def find_clone_folder() -> Path | None:
    """Return the root of the repository; None when the program was installed from a wheel."""
    return None if (PACKAGE_DIR / "assets").is_dir() else PACKAGE_DIR.parent


def get_assets_folder() -> Path:
    """Return the folder of the toy world's models, `adapters`, `configs`, `studies` and
    `subjects`."""
    return (find_clone_folder() or PACKAGE_DIR) / "assets"


def get_import_environment() -> dict[str, str]:
    """Return the variables by which a child process imports this program from any folder."""
    clone = find_clone_folder()
    if clone is None:
        return {}
    inherited = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": f"{clone}{os.pathsep}{inherited}" if inherited else str(clone)}


def expand_user_path(path: str | Path) -> Path:
    """Return the user's path with `~` resolved.

    That of an unknown user stays, where pathlib's own raises a RuntimeError.
    """
    return Path(os.path.expanduser(path))


def find_asset(path: str) -> str:
    """Return the user's path with `~` resolved; `assets/…` that does not exist is the program's
    own."""
    path = os.path.expanduser(path)
    parts = Path(path).parts
    # Examples in the README name `assets/…` and must work from any folder.
    if parts[:1] != ("assets",) or os.path.exists(path):
        return path
    asset = get_assets_folder().joinpath(*parts[1:])
    return str(asset) if asset.exists() else path


SUBJECT_FILE = "subject.json"
"""File beside photos with their token and class word, and a toy's description."""
MAX_WORD_CHARACTERS = 60
"""Longest token, and longest class word."""
HUB_ID_PATTERN = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""`owner/model` of the hub."""


def get_public_name(name: str | Path) -> str:
    """Return a name without private folders: a hub id or `toy` unchanged, of a path the last
    part."""
    path = os.path.expanduser(str(name))
    if path and os.path.exists(path):
        return os.path.basename(os.path.abspath(path))
    text = str(name).replace("\\", "/")
    return text if HUB_ID_PATTERN.fullmatch(text) else Path(text).name


def find_free_name(
    name: str, is_taken: Callable[[str], bool], separator: str = "_", *, is_numbered: bool = False
) -> str:
    """Return a name that is not taken: `name`, else the first of `name_2`, `name_3` and so on.

    name: preferred name
    is_taken: returns whether a name is taken
    separator: between the name and the number
    is_numbered: whether the name always gets a number, from 1
    """
    if not is_numbered and not is_taken(name):
        return name
    numbers = count(1 if is_numbered else 2)
    candidates = (f"{name}{separator}{number}" for number in numbers)
    return next(candidate for candidate in candidates if not is_taken(candidate))
