"""The adapters of a picture: those that the user gives, or those in a PNG's recipe, found again by their SHA-256."""

from dataclasses import dataclass
from pathlib import Path

from dreambooth_moslora.adapters.files.lora_file import adapter_name
from dreambooth_moslora.core.assets import assets_folder, find_asset
from dreambooth_moslora.core.digests import file_digest
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.run_files.adapter_files import find_weights
from dreambooth_moslora.generation.params import Recipe

__all__ = ["AdapterFile", "adapters_of_picture", "given_adapters"]


@dataclass(frozen=True)
class AdapterFile:
    """A file to use as `name` at `scale`. `note` is for the user, or empty."""

    file: Path
    name: str
    scale: float
    note: str = ""


def given_adapters(given: list[tuple[str, float | None]], recipe: Recipe | None) -> list[AdapterFile]:
    """Path and scale, as the user gave them. A scale of None is the picture's, or 1. Raises UserError."""
    return [_given(path, scale, recipe) for path, scale in given]


def adapters_of_picture(recipe: Recipe) -> list[AdapterFile]:
    """The adapters of the picture, looked up among local files. Raises UserError for a missing one."""
    hashes = dict(recipe.provenance.adapter_sha256)
    return [AdapterFile(_find(name, hashes.get(name)), name, scale) for name, scale in recipe.params.adapters]


def _given(path: str, scale: float | None, recipe: Recipe | None) -> AdapterFile:
    scales, hashes = (dict(recipe.params.adapters), dict(recipe.provenance.adapter_sha256)) if recipe else ({}, {})
    place = Path(find_asset(path))
    file = _find(path, hashes.get(path)) if path in scales and not place.exists() else find_weights(place)
    digest = file_digest(file) if hashes else ""
    name = path if path in scales and not place.exists() else adapter_name(file)
    in_picture = next((known for known in scales if hashes.get(known) == digest), name)
    differs = hashes.get(in_picture, digest) != digest
    note = f"the adapter {name} is another file than the one that made the picture" if differs else ""
    return AdapterFile(file, name, scales.get(in_picture, 1.0) if scale is None else scale, note)


def _find(name: str, sha256: str | None) -> Path:
    """The file with this content under any name; without a sha256, the file with this name. Raises UserError."""
    files = _files_here()
    named = [file for file in files if adapter_name(file) == name]
    for file in [*named, *files] if sha256 else named:
        if sha256 in (None, file_digest(file)):
            return file
    known = f" (sha256 {sha256[:12]})" if sha256 else ""
    other = f"; {named[0]} has its name and is another file" if named else ""
    raise UserError(
        f"the picture's adapter {name!r:.60}{known} is not in runs/ nor in assets/adapters/{other}; "
        "give its file with --adapter"
    )


def _files_here() -> list[Path]:
    """The program's own adapters, then those of the runs in `runs/`, with their best steps and checkpoints."""
    runs = Path("runs")
    places = [*runs.glob("*/*.safetensors"), *runs.glob("*/*/*.safetensors")]
    own = sorted((assets_folder() / "adapters").glob("*.safetensors"))
    return [file for file in [*own, *sorted(places)] if file.is_file()]
