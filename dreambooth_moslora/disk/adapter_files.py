"""Adapter files: in folders of adapters and runs, under the names that the user chooses from; and their headers."""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dreambooth_moslora.core.errors import UserError, one_line
from dreambooth_moslora.core.names import free_name
from dreambooth_moslora.disk.run_folder import (
    BASIS_SUFFIX,
    BEST_NAME,
    MIXERS_NAME,
    PUBLISHED_NAME,
    RAW_NAME,
    TOKENS_SUFFIX,
    RunDir,
)

NONE = "none"
"""The choice of no adapter; no file gets this name."""
UNSAFE = re.compile(r"[^\w .+-]+")


def find_weights(path: str | Path) -> Path:
    """The safetensors file of an adapter: the path itself, the published file of a run, or the raw one of a checkpoint.

    Raises UserError when there is none, and for any format that can carry code (pickles).
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / (PUBLISHED_NAME if (path / PUBLISHED_NAME).is_file() else RAW_NAME)
    if not path.is_file():
        raise UserError(f"there is no adapter file {path}")
    if path.suffix != ".safetensors":
        raise UserError(f"{path.name} is not a .safetensors file; other formats can carry code and are not opened")
    return path


def header_of(file: Path) -> dict[str, str]:
    """The strings in the header of a safetensors file; no tensor is read. Raises UserError for any other file."""
    try:
        with safe_open(file, framework="np") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"it is not a safetensors file, or it is damaged: {one_line(error)}") from None


def files_by_name(files: Iterable[Path], folders: Collection[Path], taken: Collection[str] = ()) -> dict[str, Path]:
    """Name -> file, in order; a name that is `taken` gets a number.

    Files of new tokens and bases are left out, as they belong to an adapter; so are links that lead out of `folders`.
    """
    found: dict[str, Path] = {}
    for file in files:
        if not file.name.endswith((TOKENS_SUFFIX, BASIS_SUFFIX)) and is_file_inside(file, folders):
            found[free_name(name_of(file, folders), {NONE, *taken, *found}.__contains__, " ")] = file
    return found


def run_files(runs: Collection[Path]) -> list[Path]:
    """Adapters of runs, the newest run first with its best step and its mixers alone, then checkpoints, each run's
    from the last to the first."""
    dirs = map(RunDir, runs)
    places = [place for d in dirs for place in (d.adapter_path, d.best_dir / PUBLISHED_NAME, d.mixers_path)]
    finished = [file for file in places if file.is_file()]
    checkpoints = [file for run in runs for file in run.glob(f"checkpoint-*/{RAW_NAME}")]
    newest = {run: RunDir(run).adapter_path.stat().st_mtime for run in runs if RunDir(run).adapter_path.is_file()}
    finished.sort(key=lambda file: -max(newest.get(run, 0.0) for run in (file.parent, file.parent.parent)))
    return [*finished, *sorted(checkpoints, key=checkpoint_order)]


def checkpoint_order(file: Path) -> tuple[str, int]:
    return file.parent.parent.name, -step_of(file.parent)


def step_of(checkpoint: Path) -> int:
    digits = checkpoint.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdigit() else 0


def name_of(file: Path, folders: Collection[Path]) -> str:
    """`dog`, `dog@500` for a checkpoint, `dog@best` for the best step of a run, `dog@mixers` for mixers alone."""
    if file.name == RAW_NAME:
        return f"{clean_name(file.parent.parent.name)}@{step_of(file.parent)}"
    if file.name == MIXERS_NAME and file.parent not in folders:
        return f"{clean_name(file.parent.name)}@mixers"
    if file.name != PUBLISHED_NAME:
        return clean_name(file.stem)
    is_best = file.parent.name == BEST_NAME and file.parent.parent not in folders
    return f"{clean_name(file.parent.parent.name)}@best" if is_best else clean_name(file.parent.name)


def clean_name(text: str) -> str:
    """A name to show, to put in a tag and to use as a file name: letters, digits, space and `.+-_`."""
    return UNSAFE.sub("_", text).strip(" ._")[:60] or "adapter"


def is_file_inside(file: Path, folders: Collection[Path]) -> bool:
    """Whether it is a regular file inside the folders, after following links. Circular links and pipes are not."""
    try:
        place = file.resolve(strict=True)
        return place.is_file() and any(place.is_relative_to(folder.resolve()) for folder in folders)
    except (OSError, RuntimeError):
        return False
