"""The training form as a value: a few words and numbers, turned into the settings that `train FOLDER WORD` chooses."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_moslora.core.config.like import FoundRecipe
from dreambooth_moslora.core.config.run_settings import MEMORY_WORDS
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.numbers import is_number
from dreambooth_moslora.core.run_files.adapter_files import NONE
from dreambooth_moslora.core.toy import is_toy
from dreambooth_moslora.generation.params import check_characters
from dreambooth_moslora.training.planning.choices import (
    TOKEN,
    USUAL_EXPOSURES,
    Choices,
    choose_recipe,
    choose_scores,
    choose_shapes,
    choose_steps,
    choose_subjects,
    choose_words,
    encoders_are_here,
    recipe_settings,
)
from dreambooth_moslora.ui.adapters.recipes import MOST, taken_from
from dreambooth_moslora.ui.server.photo_uploads import kept_photos
from dreambooth_moslora.ui.train.memory_choice import free_gib
from dreambooth_moslora.ui.train.more_subjects import SubjectWords, folder_of, prompts_of, table_of, words_in

if TYPE_CHECKING:
    from dreambooth_moslora.photos.photo import Photo

__all__ = ["OWN_FIELDS", "PRESETS", "PRIORS", "TOKENS_RATE", "TrainForm", "crop_config", "form_of"]

PRESETS = {"quick": 0.5, "standard": 1.0, "thorough": 2.0}
"""Name -> how often each photo is shown, as a multiple of what the recipe says."""
TOKENS_RATE = 1e-3
"""The trainer's own default, diffusers', hardly moves new tokens."""
PRIORS = ("adapter_off", "class_images")


@dataclass(frozen=True)
class TrainForm:
    """Names of the fields are the API's argument names. 0 in a number, and None, mean: as the recipe has it.

    `begin_with` and `like` name an adapter or a recipe that can be chosen on the page; where its file lies is not
    the form's to know.
    """

    token: str
    class_word: str
    run_name: str = ""
    preset: str = "standard"
    prior_preservation: bool = True
    captions: str = ""
    rank: int = 0
    learning_rate: float = 0.0
    steps: int = 0
    mixer: str = "orthogonal"
    seed: int = 0
    make_masks: bool | None = None
    memory: str = "auto"
    prior: str = "adapter_off"
    prior_weight: float = 0.0
    unmasked_weight: float = 0.2
    scores: bool | None = None
    make_captions: bool = False
    new_tokens: bool = False
    tokens_begin_as: str = ""
    tokens_learning_rate: float = TOKENS_RATE
    begin_with: str = NONE
    like: str = NONE
    others: tuple[SubjectWords, ...] = ()

    @property
    def subjects(self) -> tuple[SubjectWords, ...]:
        return (SubjectWords(self.class_word, self.token, self.captions, self.tokens_begin_as), *self.others)

    def choices(
        self,
        base: str,
        resolution_px: int,
        photos_dir: Path,
        run_dir: Path,
        *,
        is_queued: bool = False,
        recipe: FoundRecipe | None = None,
    ) -> Choices:
        """What the command would choose for these photos and words. Raises UserError for invalid values.

        `photos_dir` is the first subject's; the others' folders are beside it (`folder_of`). `recipe` is that of
        `like`.
        """
        given = self.given(base, resolution_px, photos_dir, run_dir)
        share, wants_scores = PRESETS[_one_of(PRESETS, self.preset, "preset")], _switch(self.scores, "scores")
        is_usual = wants_scores == encoders_are_here(base)
        if recipe is None:
            choices = Choices(given)
            exposures = choose_recipe(choices, free_for(base, is_later=is_queued))
        else:
            given |= self.ticks()
            choices = Choices(taken_from(recipe, given, share) | given)
            exposures = USUAL_EXPOSURES
            choices.say(f"settings like {self.like}, where the form says nothing else")
        if self.others:
            choose_subjects(choices)
        else:
            choose_words(choices, " ".join(str(self.class_word).split()))
        photos = usable_photos(photos_dir, resolution_px, len(self.subjects))
        choose_steps(choices, round(share * exposures), photos)
        choose_scores(choices, photos, None if is_usual else wants_scores)
        return choices

    def config(
        self, base: str, resolution_px: int, photos_dir: Path, run_dir: Path, recipe: FoundRecipe | None = None
    ) -> dict[str, Any]:
        """All settings, for TrainConfig."""
        return self.choices(base, resolution_px, photos_dir, run_dir, recipe=recipe).all

    def given(self, base: str, resolution_px: int, photos_dir: Path, run_dir: Path) -> dict[str, Any]:
        """The form's own values, under the names of TrainConfig. Raises UserError."""
        prompts_of(self.token, self.class_word)
        check_characters(str(self.captions or ""), "a caption")
        token, makes_masks = " ".join(str(self.token).split()), _switch(self.make_masks, "make_masks")
        is_usual = makes_masks in (None, is_toy(base))
        memory = _one_of(MEMORY_WORDS, self.memory, "memory")
        numbers = {
            "token": token if token != TOKEN and not self.others else "",
            "rank": _whole(self.rank, "rank", MOST["rank"]),
            "learning_rate": _number(self.learning_rate, "learning rate", MOST["learning_rate"]),
            "max_train_steps": _whole(self.steps, "steps", MOST["max_train_steps"]),
            "memory": "" if is_toy(base) else memory,
            "masks": "" if is_usual else "auto" if makes_masks else "given",
            "captions": "auto" if _switch(self.make_captions, "make_captions") else "",
        }
        return {
            "pretrained_model_name_or_path": base,
            "variant": None,  # the files that the page itself has loaded
            **self.photos_given(photos_dir),
            "output_dir": str(run_dir),
            "resolution": resolution_px,
            "mixer": self.mixer,
            "seed": _whole(self.seed, "seed", MOST["seed"]),
            "unmasked_weight": _number(self.unmasked_weight, "weight outside the mask", 1),
            **{name: value for name, value in numbers.items() if value},
            **self.prior_given(),
            **self.tokens_given(),
        }

    def photos_given(self, photos_dir: Path) -> dict[str, Any]:
        """The photos' folders: one, or a table for each of several subjects. Raises UserError."""
        if not self.others:
            return {"instance_data_dir": str(photos_dir)}
        tables = [
            table_of(number, words, photos_dir) | self.concept_of(words)
            for number, words in enumerate(self.subjects, 1)
        ]
        prompts = [table["instance_prompt"] for table in tables]
        if twice := next((prompt for prompt in prompts if prompts.count(prompt) > 1), None):
            raise UserError(f"two subjects are called “{twice}”; give each a token or a class of its own")
        return {"subjects": tables}

    def prior_given(self) -> dict[str, Any]:
        prior = _one_of(PRIORS, self.prior, "prior")
        weight = _number(self.prior_weight, "prior weight", MOST["prior_loss_weight"])
        if not self.prior_preservation:
            return {"with_prior_preservation": False}
        given: dict[str, Any] = {}
        if prior != PRIORS[0]:
            given["prior"] = prior
        if weight:
            given["prior_loss_weight"] = weight
        return given

    def ticks(self) -> dict[str, Any]:
        """What the form's ticks say beside a file, which may say something else; `given` has checked them."""
        ticks = {
            "with_prior_preservation": bool(self.prior_preservation),
            "captions": "auto" if self.make_captions else "given",
            "train_text_encoder_ti": bool(self.new_tokens),
        }
        if self.prior_preservation:
            ticks["prior"] = self.prior
        if self.make_masks is not None:
            ticks["masks"] = "auto" if self.make_masks else "given"
        return ticks

    def tokens_given(self) -> dict[str, Any]:
        if not _switch(self.new_tokens, "new_tokens"):
            return {}
        rate = _number(self.tokens_learning_rate, "learning rate of the new tokens", MOST["text_encoder_lr"])
        given = {"train_text_encoder_ti": True, "text_encoder_lr": rate}
        return given | ({} if self.others else self.concept_of(self.subjects[0]))

    def concept_of(self, words: SubjectWords) -> dict[str, str]:
        """What the new tokens of a subject begin as, if the words say it. Raises UserError."""
        concept = " ".join(str(words.tokens_begin_as or "").split())
        if not (self.new_tokens and concept):
            return {}
        check_characters(concept, "what the new tokens begin as")
        return {"initializer_concept": concept}

    def write_captions(self, photos_dir: Path) -> None:
        """Write each line of the captions into a text file beside its photo; empty lines are skipped."""
        for number, words in enumerate(self.subjects, 1):
            lines = str(words.captions or "").splitlines()
            for photo, line in zip(kept_photos(folder_of(photos_dir, number)), lines):
                if line.strip():
                    photo.with_suffix(".txt").write_text(line.strip(), encoding="utf-8")


OWN_FIELDS = tuple(field.name for field in fields(TrainForm) if field.name != "others")
"""Fields that do not describe further subjects."""


def form_of(values: Mapping[str, Any]) -> TrainForm:
    """The form from all fields' values, by name. Raises UserError for invalid subjects."""
    own = {name: values[name] for name in OWN_FIELDS if name in values}
    return TrainForm(**own, others=words_in(values))


def free_for(base: str, *, is_later: bool = False) -> float | None:
    """Free GPU memory for the choice of recipe, GiB; None for the embedded base, which needs none."""
    return None if is_toy(base) else free_gib(is_later=is_later)


def usable_photos(photos_dir: Path, resolution_px: int, subjects: int = 1) -> list["Photo"]:
    """The usable photos of the first `subjects` subjects. Raises UserError for a subject without any."""
    from dreambooth_moslora.photos.folder import find_photos

    found = []
    for number in range(1, subjects + 1):
        folder = folder_of(photos_dir, number)
        if number > 1 and not kept_photos(folder):
            raise UserError(f"add some photos of subject {number} first")
        photos = find_photos(folder, "", resolution_px).photos
        if not photos:
            whose = f" of subject {number}" if number > 1 else ""
            raise UserError(f"none of the photos{whose} can be used; the reasons are shown below them")
        found += [replace(photo, subject=number - 1) for photo in photos]
    return found


def crop_config(
    base: str,
    resolution_px: int,
    photos_dir: Path,
    photos: Sequence["Photo"],
    seed: Any = 0,
    like: FoundRecipe | None = None,
) -> TrainConfig:
    """The settings that decide the crops, like those of `TrainForm.choices`; the words are not needed."""
    recipe = taken_from(like, {"with_prior_preservation": False}) if like else recipe_settings(base, free_for(base))[1]
    own = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": str(photos_dir),
        "instance_prompt": "a photo",
        "resolution": resolution_px,
        "seed": _whole(seed, "seed", MOST["seed"]),
    }
    choices = Choices(recipe | own)
    choose_shapes(choices, photos)
    return TrainConfig.from_dict(choices.all)


def _whole(value: Any, name: str, limit: int) -> int:
    value = 0 if value is None else value
    if not is_number(value) or not 0 <= value <= limit or not float(value).is_integer():
        raise UserError(f"{name} must be a whole number from 0 to {limit}, not {value!r:.30}")
    return int(value)


def _number(value: Any, name: str, limit: float) -> float:
    value = 0.0 if value is None else value
    if not is_number(value) or not 0 <= value <= limit:
        raise UserError(f"the {name} must be a number from 0 to {limit}, not {value!r:.30}")
    return float(value)


def _switch(value: Any, name: str) -> bool | None:
    if value not in (True, False, None):
        raise UserError(f"{name} must be true or false, not {value!r:.30}")
    return value


def _one_of(names: Collection[str], value: Any, kind: str) -> str:
    if not isinstance(value, str) or value not in names:
        raise UserError(f"there is no {kind} {value!r:.30}; choose {', '.join(names)}")
    return value
