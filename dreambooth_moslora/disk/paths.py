"""Where things lie: the program's own assets, caches, paths of the user's, public names."""

import os
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path

# The folder of the program's own modules.
PACKAGE_DIR = Path(__file__).resolve().parents[1]


def find_clone_folder() -> Path | None:
    """The root of the repository, or None when the program was installed from a wheel."""
    return None if (PACKAGE_DIR / "assets").is_dir() else PACKAGE_DIR.parent


def get_assets_folder() -> Path:
    """The folder of the toy world's models, `adapters`, `configs`, `studies` and `subjects`."""
    return (find_clone_folder() or PACKAGE_DIR) / "assets"


def get_import_environment() -> dict[str, str]:
    """Environment variables that let a child process import this program from any folder:
    PYTHONPATH in a clone."""
    clone = find_clone_folder()
    if clone is None:
        return {}
    inherited = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": f"{clone}{os.pathsep}{inherited}" if inherited else str(clone)}


def expand_user_path(path: str | Path) -> Path:
    """A path of the user's, `~` resolved. That of an unknown user stays, where pathlib's own raises
    a RuntimeError."""
    return Path(os.path.expanduser(path))


def find_asset(path: str) -> str:
    """A path of the user's, `~` resolved; `assets/…` that is not there is the program's own."""
    path = os.path.expanduser(path)
    parts = Path(path).parts
    # The README's examples say `assets/…`, and shall work from any folder.
    if parts[:1] != ("assets",) or os.path.exists(path):
        return path
    own = get_assets_folder().joinpath(*parts[1:])
    return str(own) if own.exists() else path


SUBJECT_FILE = "subject.json"  # Beside photos: their token and class word; of a toy, what it is
MAX_WORD_CHARACTERS = 60  # Of a token, and of the word for what photos show.
# `owner/model` of the hub.
HUB_ID_PATTERN = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def get_public_name(name: str | Path) -> str:
    """A hub id or `toy` unchanged; of a path, also a Windows path, only its last part, since the
    rest is private."""
    path = os.path.expanduser(str(name))
    if path and os.path.exists(path):
        return os.path.basename(os.path.abspath(path))
    text = str(name).replace("\\", "/")
    return text if HUB_ID_PATTERN.fullmatch(text) else Path(text).name


def find_free_name(
    name: str, is_taken: Callable[[str], bool], separator: str = "_", *, is_numbered: bool = False
) -> str:
    """A name that is not taken: `name`, else the first of `name_2`, `name_3` and so on.

    name: the wanted one
    is_taken: whether a name is
    separator: between the name and the number
    is_numbered: whether it has a number in any case, from 1
    """
    if not is_numbered and not is_taken(name):
        return name
    numbers = count(1 if is_numbered else 2)
    candidates = (f"{name}{separator}{number}" for number in numbers)
    return next(candidate for candidate in candidates if not is_taken(candidate))
