"""From a PNG's recipe to the form: adapters are found again by content, and differences become remarks."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.generation.limits import check_size
from dreambooth_moslora.generation.params import GenerationParams, Recipe, read_recipe
from dreambooth_moslora.ui.generate.form import RANGES

__all__ = ["clamp_to_widgets", "match_adapters", "recipe_of"]


def recipe_of(file: str | Path) -> Recipe:
    """The recipe of any PNG. Raises UserError for one that is damaged, or that contains infinite numbers."""
    try:
        return read_recipe(file)
    except UserError:
        raise
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError("the recipe inside the PNG is damaged") from error


def match_adapters(recipe: Recipe, files: Mapping[str, Path], base: str) -> tuple[GenerationParams, list[str]]:
    """The parameters with this page's names of the adapters (`files`), and a remark for each difference."""
    wanted = dict(recipe.provenance.adapter_sha256)
    remarks = list(recipe.remarks)
    adapters = []
    for name, scale in recipe.params.adapters:
        found, remark = _find(name, wanted.get(name), files)
        adapters.append((found, scale))
        remarks += [remark] if remark else []
    if recipe.provenance.base and recipe.provenance.base != base:
        remarks.append(f"it was made with the base {recipe.provenance.base}; this page has {base}")
    unique = tuple(dict(adapters).items())
    return replace(recipe.params, adapters=unique), remarks


def clamp_to_widgets(
    params: GenerationParams, resolution_px: int, guidance: float
) -> tuple[GenerationParams, list[str]]:
    """The nearest parameters that the page's widgets accept, and a remark for each change.

    A recipe without a guidance gets the base's own.
    """
    remarks: list[str] = []

    def near(value: float, name: str, words: str) -> float:
        low, high = RANGES[name]
        if low <= value <= high:
            return value
        nearest = min(max(value, low), high)
        remarks.append(f"{words} {value:g} is beyond what the page offers; {nearest:g} is set")
        return nearest

    wanted = guidance if params.guidance_scale is None else params.guidance_scale
    params = replace(
        params,
        steps=near(params.steps, "steps", "the number of steps"),
        guidance_scale=near(wanted, "guidance_scale", "guidance"),
        adapters=tuple((name, near(scale, "scale", f"scale of {name}:")) for name, scale in params.adapters),
    )
    try:
        check_size(params, resolution_px)
    except UserError as error:
        remarks.append(f"{error}; the base's own size is set")
        params = replace(params, width_px=None, height_px=None)
    return params, remarks


def _find(name: str, sha256: str | None, files: Mapping[str, Path]) -> tuple[str, str]:
    """(name on this page, remark). A file with the same content under another name is used."""
    if name in files and sha256 in (None, _sha256_of(files[name])):
        return name, ""
    if sha256 and (twin := next((n for n, file in files.items() if _sha256_of(file) == sha256), None)):
        return twin, ""
    if name in files:
        return name, f"the adapter {name} here is another file than the one that made the picture"
    return name, f"the adapter {name} is not here"


def _sha256_of(file: Path) -> str:
    facts = file.stat()
    return _digest(file, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=256)
def _digest(file: Path, mtime_ns: int, size: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
