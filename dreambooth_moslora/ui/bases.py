"""The bases that the page offers by name, and what each is and needs, by its files alone."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_moslora.base.files import INDEX, SMALL_BASE_PX, facts_of_base, is_hub_id, shapes_in, weight_files
from dreambooth_moslora.core import UserError, free_name, is_toy, one_line, public_name
from dreambooth_moslora.disk.run_folder import clean_name

if TYPE_CHECKING:
    from dreambooth_moslora.generation.pipeline import SubjectPipeline

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
DEPTH = 3
CHECKPOINT_MARK = "model.diffusion_model."  # Begins keys of a single-file checkpoint, and of no adapter
OF_TOY = "a 128 px practice model: it trains in minutes without a GPU, and knows only its own toys"


@dataclass(frozen=True)
class PageBase:
    """One base: `title` is shown to everyone, `name` is what the trainer gets and may be a path. `about` is a sentence
    without its first word and full stop. `load` may raise UserError."""

    title: str
    name: str
    resolution_px: int
    load: Callable[[], "SubjectPipeline"]
    about: str = ""
    templates: tuple[str, ...] = ()

    @property
    def is_small(self) -> bool:
        """Whether it needs no care with memory, such as the embedded one."""
        return self.resolution_px <= SMALL_BASE_PX


def bases_below(folder: Path) -> list[Path]:
    """Diffusers folders and single-file checkpoints at most three levels below `folder`. What cannot be read is left
    out. Raises UserError when there is no such folder."""
    require_bases_dir(folder)
    found = []
    for place, folders, files in os.walk(folder):
        inner = [Path(place, name) for name in sorted(folders) if not name.startswith(".")]
        whole = [path for path in inner if (path / INDEX).is_file() and not path.with_suffix(".safetensors").is_file()]
        found += [*whole, *(path for name in sorted(files) if is_checkpoint(path := Path(place, name)))]
        is_deep = len(Path(place).relative_to(folder).parts) >= DEPTH - 1
        folders[:] = [] if is_deep else [path.name for path in inner if not (path / INDEX).is_file()]
    return found


def require_bases_dir(folder: Path) -> None:
    """Raises UserError when there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"--bases_dir {folder} is not a folder; name the one that your bases lie in")


def is_checkpoint(file: Path) -> bool:
    try:
        return file.suffix == ".safetensors" and any(name.startswith(CHECKPOINT_MARK) for name in shapes_in(file))
    except (UserError, OSError):
        return False


def cached_folder(name: str) -> Path | None:
    """Where the hub's cache has the model of that id; None where it has not, and for a path."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, INDEX) if is_hub_id(name) else None
    return Path(found).parent if isinstance(found, str) else None


def offered(first: str, bases_dir: Path | None) -> dict[str, str]:
    """Title -> name of each base: the operator's `first`, the toy, SDXL if it is here, and those below `bases_dir`.
    Raises UserError."""
    names = [first, "toy", *([SDXL] if cached_folder(SDXL) else [])]
    names += map(str, bases_below(bases_dir) if bases_dir else [])
    found: dict[str, str] = {}
    places: dict[str, str] = {}
    for name in names:
        places.setdefault(os.path.realpath(os.path.expanduser(name)), name)
    for name in places.values():
        found[free_name(clean_name(public_name(name)), found.__contains__, " ")] = name
    return found


def about(name: str, folder: Path | None, resolution_px: int) -> str:
    """What the base is and needs; its files are not loaded."""
    if is_toy(name):
        return OF_TOY
    if folder is None:
        return "fetched from the hub when it is loaded for the first time"
    parts = [part for part in folder.iterdir() if part.is_dir()] if folder.is_dir() else []
    files = [file for part in parts for file in weight_files(part)] if parts else [folder]
    gib = sum(file.stat().st_size for file in files) / 2**30
    is_small = resolution_px <= SMALL_BASE_PX
    needs = "it needs no GPU" if is_small else "it wants a GPU; without one a picture takes minutes"
    try:
        return f"{facts_of_base(folder).title}, {resolution_px} px, {gib:.1f} GiB of weights: {needs}"
    except UserError as error:
        return f"it cannot be used: {one_line(error)}"
