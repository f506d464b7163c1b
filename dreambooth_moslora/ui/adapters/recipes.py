"""The recipes that “Train like” offers: those of the adapters that can be chosen, and of a visitor's own files.

Of a visitor's file only the recipe is kept, so it need not fit this base.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_moslora.core.config.like import FoundRecipe, recipe_in_file, unless_given
from dreambooth_moslora.core.config.targets import parse_pattern
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.names import free_name
from dreambooth_moslora.core.run_files.adapter_files import NONE, clean_name
from dreambooth_moslora.core.versions import version_of
from dreambooth_moslora.ui.adapters.check import check_header
from dreambooth_moslora.ui.server.users import Visitor

if TYPE_CHECKING:
    from dreambooth_moslora.ui.app_state import AppContext

__all__ = [
    "LENGTHS",
    "MOST",
    "add_recipe",
    "bounded",
    "keep_recipe",
    "like_line",
    "lengths_in",
    "recipe_names",
    "recipe_of",
    "taken_from",
]

MOST_RECIPES = 16
MOST: dict[str, float] = {
    "rank": 256,
    "learning_rate": 10,
    "text_encoder_lr": 10,
    "max_train_steps": 100_000,
    "num_train_epochs": 10_000,
    "exposures_per_photo": 10_000,
    "train_batch_size": 64,
    "gradient_accumulation_steps": 256,
    "repeats": 1000,
    "crops_per_photo": 100,
    "num_class_images": 1000,
    "prior_loss_weight": 100,
    "seed": 2**32 - 1,
}
"""The most that a visitor may ask of this machine, in the form and by a file that anyone may have written."""

LENGTHS = ("max_train_steps", "exposures_per_photo", "num_train_epochs")
OF_MACHINE = ("mixed_precision", "gradient_checkpointing", "base_quantization", "cache_cross_attention")


def recipe_names(ctx: "AppContext", visitor: Visitor) -> list[str]:
    """What can be chosen: the visitor's own files, then the adapters."""
    return [NONE, *visitor.recipes, *ctx.catalog.files(visitor)]


def recipe_of(ctx: "AppContext", name: str | None, visitor: Visitor) -> FoundRecipe | None:
    """The recipe of that name; None of none. Raises UserError for an unlisted name, and for an adapter without one."""
    name = str(name or NONE)
    if name == NONE:
        return None
    return visitor.recipes.get(name) or read(ctx.catalog.path(name, visitor), name)


def add_recipe(ctx: "AppContext", uploaded: str | Path, visitor: Visitor) -> str:
    """Keep the recipe of an uploaded file for its visitor alone; returns its name. Raises UserError."""
    file = Path(uploaded)
    if file.suffix != ".safetensors":
        raise UserError(f"{file.name} is not a .safetensors file; other formats can carry code and are not opened")
    found = read(file, file.name)
    name = free_name(clean_name(file.name), recipe_names(ctx, visitor).__contains__, " ")
    keep_recipe(ctx, name, found, visitor)
    return name


def keep_recipe(ctx: "AppContext", name: str, recipe: FoundRecipe | None, visitor: Visitor) -> None:
    """Keep a recipe that a run of the visitor was given, unless its name is listed."""
    if recipe is None or name in recipe_names(ctx, visitor):
        return
    visitor.recipes[name] = recipe
    while len(visitor.recipes) > MOST_RECIPES:
        visitor.recipes.pop(next(iter(visitor.recipes)))


def read(file: Path, name: str) -> FoundRecipe:
    try:
        check_header(file)
        return bounded(recipe_in_file(file))
    except UserError as error:
        raise UserError(f"nothing is taken from {name}: {error}") from error


def bounded(found: FoundRecipe) -> FoundRecipe:
    """The recipe without settings beyond MOST, each of which gets a line. Raises UserError where nothing is left."""
    great = {name: value for name, value in found.settings.items() if is_too_great(name, value)}
    if len(great) == len(found.settings):
        raise UserError(f"none of its settings can be taken: {', '.join(great)} are too great for this page")
    kept = {name: value for name, value in found.settings.items() if name not in great}
    lines = [f"{name} is too great for this page" for name in great]
    return FoundRecipe(kept, found.without_equivalent, (*found.invalid, *lines))


def is_too_great(name: str, value: Any) -> bool:
    if name == "rank_pattern":
        return any(parse_pattern(name, text)[1] > MOST["rank"] for text in value)
    return name in MOST and value is not None and value > MOST[name]


def left_out(recipe: FoundRecipe) -> dict[str, Any]:
    """The recipe's settings that are not taken: the base has its own resolution, and the machine its own memory."""
    without = () if version_of("bitsandbytes") else ("use_8bit_adam",)
    return {name: recipe.settings[name] for name in ("resolution", *OF_MACHINE, *without) if name in recipe.settings}


def like_line(name: str, recipe: FoundRecipe) -> str:
    """What was taken, and what could not be."""
    own = left_out(recipe)
    parts = [f"Like {name}: {len(recipe.settings) - len(own)} settings, those of this form filled in"]
    parts += [f"left to this page: {', '.join(own)}"] if own else []
    return f"{'; '.join([*parts, *recipe.remarks])}."


def taken_from(recipe: FoundRecipe, given: Mapping[str, Any], share: float = 1.0) -> dict[str, Any]:
    """The recipe's settings that are neither given nor left out; its length is multiplied by `share`."""
    taken = unless_given(recipe.settings, {**left_out(recipe), **given})
    return taken | lengths_in(taken, share)


def lengths_in(settings: Mapping[str, Any], share: float) -> dict[str, int]:
    """The settings of a run's length, multiplied by `share`."""
    return {name: max(1, round(share * settings[name])) for name in LENGTHS if settings.get(name)}
