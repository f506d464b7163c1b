"""Back into the form: a run's settings, words and photos, to change something and train once more; and a recipe."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.names import is_toy
from dreambooth_moslora.plan.choices import USUAL_EXPOSURES, Choices, choose_recipe
from dreambooth_moslora.settings.prompts import subject_of
from dreambooth_moslora.settings.sources import FoundRecipe, checked_recipe
from dreambooth_moslora.settings.subjects import each_subject
from dreambooth_moslora.settings.table import MEMORY_WORDS, TrainConfig, without_removed
from dreambooth_moslora.ui.train_form import (
    LENGTHS,
    MOST_SUBJECTS,
    OWN_FIELDS,
    PRESETS,
    TOKENS,
    SubjectWords,
    TrainForm,
    bounded,
    folder_of,
    free_for,
    lengths_in,
    named,
)
from dreambooth_moslora.ui.train_start import LIKE
from dreambooth_moslora.ui.visitors import ONE_AT_A_TIME, Visitor, kept_photos

FORM_FIELDS = {
    "rank": "rank",
    "learning_rate": "learning_rate",
    "max_train_steps": "steps",
    "mixer": "mixer",
    "seed": "seed",
    "unmasked_weight": "unmasked_weight",
    "with_prior_preservation": "prior_preservation",
    "prior": "prior",
    "prior_loss_weight": "prior_weight",
    "train_text_encoder_ti": "new_tokens",
}
"""A setting of a recipe -> the form's field of the same value."""


def form_of_run(settings: Mapping[str, Any], photos_dir: Path) -> TrainForm:
    """The form that makes a run of these settings, with the captions that lie beside the photos.

    Raises UserError for settings that no configuration can have, and for more subjects than the form has.
    """
    config = TrainConfig.from_dict(without_removed(settings) | {"resume_from_checkpoint": None})
    subjects = each_subject(config)
    if len(subjects) > MOST_SUBJECTS:
        raise UserError(f"the run has {len(subjects)} subjects, and the form {MOST_SUBJECTS} at most")
    like, recipe = like_of_run(photos_dir.parent)
    first, *others = (words_of(one, folder_of(photos_dir, n)) for n, one in enumerate(subjects, 1))
    with_prior = config.with_prior_preservation
    return TrainForm(
        **asdict(first),
        **length_of(config, photos_dir, len(subjects), recipe),
        prior_preservation=with_prior,
        rank=config.rank,
        learning_rate=config.learning_rate,
        mixer=config.mixer,
        seed=config.seed or 0,
        make_masks=config.masks == "auto",
        memory=config.memory if config.memory in MEMORY_WORDS else "auto",
        prior=config.prior if with_prior else TrainForm.prior,
        prior_weight=config.prior_loss_weight if with_prior else 0.0,
        unmasked_weight=config.unmasked_weight,
        scores=bool(config.evaluate_steps),
        make_captions=config.captions == "auto",
        new_tokens=config.train_text_encoder_ti,
        tokens_learning_rate=config.text_encoder_lr if config.train_text_encoder_ti else TrainForm.tokens_learning_rate,
        begin_with=Path(config.init_adapter).stem if config.init_adapter else TrainForm.begin_with,
        like=like,
        others=tuple(others),
    )


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


def values_of(form: TrainForm) -> dict[str, Any]:
    """Of the widgets, by name: further subjects' fields are empty where the form has no such subject."""
    values = {name: getattr(form, name) for name in OWN_FIELDS} | {"subjects": len(form.subjects)}
    for number in range(2, MOST_SUBJECTS + 1):
        words = form.subjects[number - 1] if number <= len(form.subjects) else SubjectWords("", TOKENS[number - 1])
        values |= {named(field.name, number): getattr(words, field.name) for field in fields(words)}
    return values


def values_like(recipe: FoundRecipe | None, base: str) -> dict[str, Any]:
    """Of the widgets that a recipe speaks of, by name. What it says nothing of is as at first, as are all for None."""
    said = recipe.settings if recipe else {}
    form = {field: said.get(name, getattr(TrainForm, field)) for name, field in FORM_FIELDS.items()}
    has_tokens = form["new_tokens"] and "text_encoder_lr" in said
    return form | {
        "preset": TrainForm.preset,
        "prior_weight": form["prior_weight"] if form["prior_preservation"] else 0.0,
        "make_masks": said["masks"] == "auto" if "masks" in said else is_toy(base),
        "make_captions": said.get("captions") == "auto",
        "tokens_learning_rate": said["text_encoder_lr"] if has_tokens else TrainForm.tokens_learning_rate,
    }
