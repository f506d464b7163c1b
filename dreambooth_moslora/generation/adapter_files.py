"""Which adapter files draw a picture: those that are given, or those that its PNG names."""

from dataclasses import dataclass
from pathlib import Path

from dreambooth_moslora.disk.contents import file_digest
from dreambooth_moslora.disk.paths import assets_folder, find_asset
from dreambooth_moslora.disk.run_folder import find_weights
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.params import Recipe
from dreambooth_moslora.lora.lora_file import adapter_name


@dataclass(frozen=True)
class AdapterFile:
    """An adapter to be loaded."""

    file: Path
    name: str
    scale: float


def given_adapter(path: str, scale: float | None, recipe: Recipe | None) -> AdapterFile:
    """An adapter as the user gave it. Without a scale it has that of its name in the picture, or
    1. Raises UserError."""
    file = find_weights(find_asset(path))
    name = adapter_name(file)
    scales = dict(recipe.params.adapters) if recipe else {}
    if scale is None:
        scale = scales.get(name, 1.0)
    return AdapterFile(file=file, name=name, scale=scale)


def adapters_of_picture(recipe: Recipe) -> list[AdapterFile]:
    """The adapters of the picture, looked up among local files. Raises UserError for a missing
    one."""
    hashes = dict(recipe.provenance.adapter_sha256)
    found = []
    for name, scale in recipe.params.adapters:
        file = file_of_content(name, hashes.get(name))
        found.append(AdapterFile(file=file, name=name, scale=scale))
    return found


def file_of_content(name: str, sha256: str | None) -> Path:
    """The file with this content under any name; without a sha256, the file with this name. Raises
    UserError."""
    # Where adapters lie: the bundled ones, the runs, and the folders in them, such as best/
    runs = Path("runs")
    bundled = sorted((assets_folder() / "adapters").glob("*.safetensors"))
    trained = sorted([*runs.glob("*/*.safetensors"), *runs.glob("*/*/*.safetensors")])
    files = [*bundled, *trained]

    # Those of its name first: hashing the others takes time.
    named = [file for file in files if adapter_name(file) == name]
    for file in [*named, *files] if sha256 else named:
        if sha256 in (None, file_digest(file)):
            return file
    known = f" (sha256 {sha256[:12]})" if sha256 else ""
    raise UserError(
        f"the picture's adapter {name!r:.60}{known} is not in runs/ nor in assets/adapters/; "
        "give its file with --adapter"
    )
