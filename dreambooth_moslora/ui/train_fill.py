"""What fills the form: the settings, words and photos of an earlier run, or the recipe of a file (“Train like”).

Of a visitor's file only the recipe is kept, so it need not fit this base.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.names import free_name
from dreambooth_moslora.disk.adapter_files import NONE, clean_name
from dreambooth_moslora.plan.choices import USUAL_EXPOSURES, Choices, choose_recipe
from dreambooth_moslora.settings.fields import parse_pattern
from dreambooth_moslora.settings.prompts import subject_of
from dreambooth_moslora.settings.sources import FoundRecipe, checked_recipe, recipe_in_file
from dreambooth_moslora.settings.subjects import each_subject
from dreambooth_moslora.settings.table import TrainConfig, without_removed
from dreambooth_moslora.ui.adapters import check_header
from dreambooth_moslora.ui.train_form import (
    LENGTHS,
    MOST,
    MOST_SUBJECTS,
    PRESETS,
    SubjectWords,
    TrainForm,
    folder_of,
    free_for,
    lengths_in,
    values_from,
)
from dreambooth_moslora.ui.visitors import ONE_AT_A_TIME, Visitor, kept_photos

if TYPE_CHECKING:
    from dreambooth_moslora.ui.state import AppContext

LIKE = "like"
"""Folder in a run: the recipe that it was given, NAME.json."""
MOST_RECIPES = 16


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


def form_of_run(settings: Mapping[str, Any], photos_dir: Path, form: type[TrainForm] = TrainForm) -> TrainForm:
    """The form that makes a run of these settings, with the captions that lie beside the photos.

    Raises UserError for settings that no configuration can have, and for more subjects than the form has.
    """
    config = TrainConfig.from_dict(without_removed(settings) | {"resume_from_checkpoint": None})
    subjects = each_subject(config)
    if len(subjects) > MOST_SUBJECTS:
        raise UserError(f"the run has {len(subjects)} subjects, and the form {MOST_SUBJECTS} at most")
    like, recipe = like_of_run(photos_dir.parent)
    first, *others = (words_of(one, folder_of(photos_dir, n)) for n, one in enumerate(subjects, 1))
    values = values_from(vars(config), config.pretrained_model_name_or_path, form) | {"steps": 0}
    values |= vars(first) | length_of(config, photos_dir, len(subjects), recipe)
    begun = {"begin_with": Path(config.init_adapter).stem} if config.init_adapter else {}
    return form(**values, **begun, scores=bool(config.evaluate_steps), like=like, others=tuple(others))


def words_of(config: TrainConfig, photos_dir: Path) -> SubjectWords:
    subject = subject_of(config)
    lines = [" ".join(caption_of(photo).split()) for photo in kept_photos(photos_dir)]
    captions = "\n".join(lines).rstrip()
    return SubjectWords(subject.class_word, subject.token, captions, config.initializer_concept or "")


def caption_of(photo: Path) -> str:
    try:
        return photo.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def like_of_run(run_dir: Path) -> tuple[str, FoundRecipe | None]:
    """The name and content of the recipe that the run was given; anyone may have changed the file."""
    for file in (run_dir / LIKE).glob("*.json"):
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            return file.stem, bounded(FoundRecipe(checked_recipe(settings)[0]))
        except (OSError, ValueError, AttributeError, RecursionError):
            break
    return TrainForm.like, None


def length_of(
    config: TrainConfig, photos_dir: Path, subjects: int, recipe: FoundRecipe | None = None
) -> dict[str, Any]:
    """The preset where one shows each photo as often, else the number of steps."""
    from dreambooth_moslora.plan.steps import plan_steps

    for name, share in PRESETS.items():
        wanted = lengths_in(lengths_of(config, recipe), share)
        if all(getattr(config, length) == value for length, value in wanted.items()):
            return {"preset": name}
    counts = [max(1, len(kept_photos(folder_of(photos_dir, number)))) for number in range(1, subjects + 1)]
    return {"steps": plan_steps(config, counts).total_steps}


def lengths_of(config: TrainConfig, recipe: FoundRecipe | None) -> dict[str, Any]:
    """What says the length of a standard run: the recipe, or the base's own."""
    if recipe is not None:
        lengths = {name: value for name, value in recipe.settings.items() if name in LENGTHS}
        return lengths or {"exposures_per_photo": USUAL_EXPOSURES}
    base = config.pretrained_model_name_or_path
    return {"exposures_per_photo": choose_recipe(Choices({"pretrained_model_name_or_path": base}), free_for(base))}


def take_photos_of_run(run_dir: Path, visitor: Visitor, subjects: int) -> None:
    """The photos of the run, with their masks, become the visitor's own.

    Raises UserError, and changes nothing, where those of a subject are gone.
    """
    with ONE_AT_A_TIME:
        if not all(kept_photos(folder_of(run_dir / "photos", number)) for number in range(1, subjects + 1)):
            raise UserError("the photos of this run are not there any more")
        for number in range(1, MOST_SUBJECTS + 1):
            source, target = (folder_of(folder, number) for folder in (run_dir / "photos", visitor.photos_dir))
            shutil.rmtree(target, ignore_errors=True)
            if number <= subjects:
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.txt"))
