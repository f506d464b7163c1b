"""Names, digests and places: the program's own files, the embedded base, names to show and to write.

Digests of files and settings, and the folder of caches that are named by them.

Finds the program's own files: the embedded base, sample subjects, recipes, studies, adapters.

In a clone they are in `assets/` beside the package; an installed wheel has them inside the package.

The embedded base (a small SDXL of the toy world): how it is recognised, its prompts and its guidance.

Names to show or write: a base's name without its path, free names for files, and the encoders that score
pictures.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path


def default_cache_dir() -> Path:
    """The folder of disk caches of all runs: `$XDG_CACHE_HOME/dreambooth_moslora`, or `~/.cache/…`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dreambooth_moslora"


def content_key(**facts: object) -> str:
    """A hex key of JSON-able values, the same in every process."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


TOY_PLACES = (
    "on grass",
    "in the snow",
    "on the beach",
    "on a wooden floor",
    "on a purple rug",
    "in the desert",
    "on a checkered floor",
    "in a pink room",
    "on water",
    "in a forest",
    "on a city street",
    "on the moon",
    "in a kitchen",
    "on a stage with red curtains",
    "on autumn leaves",
    "on lava",
)
TOY_TEMPLATES = tuple(f"a photo of a {{}} {place}" for place in TOY_PLACES)
"""One for each place that the embedded base knows."""
TOY_CONTEXT_TEMPLATES = tuple(
    f"a photo of a {{}} {p}" for p in ("on the beach", "in the snow", "on lava", "on the moon")
)


def is_toy(base: str) -> bool:
    """Whether the base is the embedded toy world."""
    return str(base).rstrip("/").split("/")[-1] in ("toy", "toy-sdxl")


def preferred_guidance(base: str) -> float:
    """The default classifier-free guidance of a base: 5 for SDXL. With 5, the embedded base's colours saturate,
    and adapted pictures drift further from its own (`evaluate --guidance_scale 5`)."""
    return 2.5 if is_toy(base) else 5.0


CLIP, DINO = "openai/clip-vit-large-patch14", "facebook/dinov2-base"
SUBJECT_FILE = "subject.json"
"""Beside photos: their token and class word, for commands that take folders of subjects; of a toy, what it is."""
"""Hub ids of the encoders that score pictures of SDXL."""
MAX_WORD_CHARACTERS = 60
"""Of a token, and of the word for what photos show."""

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def public_name(name: str | Path) -> str:
    """A hub id or `toy` unchanged; of a path, also a Windows path, only its last part, since the rest is private."""
    path = os.path.expanduser(str(name))
    if path and os.path.exists(path):
        return os.path.basename(os.path.abspath(path))
    text = str(name).replace("\\", "/")
    return text if HUB_ID.fullmatch(text) else Path(text).name


def free_name(name: str, is_taken: Callable[[str], bool], separator: str = "_", *, is_numbered: bool = False) -> str:
    """`name`, or the first of `name_2`, `name_3` … that is not taken; with `is_numbered` it begins at `name_1`."""
    if not is_numbered and not is_taken(name):
        return name
    numbers = count(1 if is_numbered else 2)
    return next(numbered for n in numbers if not is_taken(numbered := f"{name}{separator}{n}"))
