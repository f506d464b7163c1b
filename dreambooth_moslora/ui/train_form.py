"""The training form as a value: a few words and numbers, turned into the settings of a run.

The recipes that “Train like” offers: those of the adapters that can be chosen, and of a visitor's own files.

Of a visitor's file only the recipe is kept, so it need not fit this base.

GPU memory for a run of the page, and the lines about it.

Further subjects of the training form, from the second on: their fields, their photos' folders, their tables.

The training form as a value: a few words and numbers, turned into the settings that `train FOLDER WORD` chooses.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_moslora.core.errors import UserError, is_number
from dreambooth_moslora.core.names import MAX_WORD_CHARACTERS, free_name, is_toy
from dreambooth_moslora.disk.adapter_files import NONE, clean_name
from dreambooth_moslora.generation.params import check_characters
from dreambooth_moslora.plan.choices import (
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
from dreambooth_moslora.plan.memory import GIB, Estimate
from dreambooth_moslora.settings.fields import parse_pattern
from dreambooth_moslora.settings.sources import FoundRecipe, recipe_in_file, unless_given
from dreambooth_moslora.settings.table import MEMORY_WORDS, TrainConfig
from dreambooth_moslora.settings.versions import version_of
from dreambooth_moslora.ui.adapters import check_header
from dreambooth_moslora.ui.visitors import Visitor, kept_photos

if TYPE_CHECKING:
    from dreambooth_moslora.photos.photo import Photo
    from dreambooth_moslora.ui.state import AppContext

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
OF_MACHINE = (
    *("mixed_precision", "gradient_checkpointing", "base_quantization", "cache_cross_attention", "caching"),
    *("allow_tf32", "compile", "sample_batch_size", "prior_generation_precision"),
)


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


def card_lines(config: TrainConfig, cost: Estimate) -> list[str]:
    """Device and plan of the run, for the cost estimate; `config` has its memory plan."""
    import torch

    free = free_gib()
    if free is None:
        return ["GPU: none is here, so it trains on the CPU"]
    line = f"GPU: {torch.cuda.get_device_name()}, {free:.1f} GiB free for this run"
    if config.mixed_precision:
        recomputed = "with" if config.gradient_checkpointing else "without"
        line += f", so it trains in {config.mixed_precision}, {recomputed} gradient checkpointing"
    if config.base_quantization != "none":
        line += f", the base in {config.base_quantization}"
    return [line, *(["the GPU may have too little memory even so"] if cost.peak_gib > free else [])]


def free_gib(*, is_later: bool = False) -> float | None:
    """GPU memory for a run, GiB: what is free, and what this process frees when the run begins.

    None without a GPU. `is_later`: the whole GPU's memory, for a run that waits until the others have ended.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    free, whole = torch.cuda.mem_get_info()
    return (whole if is_later else free + torch.cuda.memory_reserved()) / GIB


MOST_SUBJECTS = 4
TOKENS = ("sks", "zwx", "ohwx", "xjy")
"""The default rare word of each further subject."""


@dataclass(frozen=True)
class SubjectWords:
    """The form's values for one subject. `captions`: one line for each photo; `tokens_begin_as`: if there are any."""

    class_word: str
    token: str
    captions: str = ""
    tokens_begin_as: str = ""


def named(name: str, number: int) -> str:
    """`class_word` for the first subject, `class_word_2` for the second."""
    return name if number == 1 else f"{name}_{number}"


def folder_of(photos_dir: Path, number: int) -> Path:
    """The folder of a subject's photos; `photos_dir` is the first one's."""
    return photos_dir.with_name(named(photos_dir.name, number))


def subject_count(photos_dir: Path, most: int) -> int:
    """How many subjects in a row, from the first on, have photos; at most the given number."""
    count = 0
    while count < most and kept_photos(folder_of(photos_dir, count + 1)):
        count += 1
    return count


def words_in(values: Mapping[str, Any]) -> tuple[SubjectWords, ...]:
    """The subjects after the first; `subjects` in `values` (by name) is the number of all.

    Raises UserError for an invalid number, and for words of a subject beyond it.
    """
    count = values.get("subjects", 1)
    if isinstance(count, bool) or count not in range(1, MOST_SUBJECTS + 1):
        raise UserError(f"subjects must be a whole number from 1 to {MOST_SUBJECTS}, not {count!r:.30}")
    for number in range(int(count) + 1, MOST_SUBJECTS + 1):
        if str(values.get(named("class_word", number)) or "").strip():
            raise UserError(f"with {named('class_word', number)}, subjects must be at least {number}, not {count}")
    return tuple(
        SubjectWords(*(str(values.get(named(name, number)) or "") for name in SubjectWords.__dataclass_fields__))
        for number in range(2, int(count) + 1)
    )


def table_of(number: int, words: SubjectWords, photos_dir: Path) -> dict[str, str]:
    """The `[[subjects]]` table of subject `number`; `photos_dir` is the first one's. Raises UserError."""
    try:
        instance_prompt, class_prompt = prompts_of(words.token, words.class_word)
        check_characters(words.captions, "a caption")
    except UserError as error:
        raise UserError(f"subject {number}: {error}") from error
    folder = str(folder_of(photos_dir, number))
    return {"instance_data_dir": folder, "instance_prompt": instance_prompt, "class_prompt": class_prompt}


def prompts_of(token: str, class_word: str) -> tuple[str, str]:
    """("a photo of a sks dog", "a photo of a dog"). Raises UserError for missing or too long words."""
    token, class_word = (" ".join(str(word or "").split()) for word in (token, class_word))
    for word, name in (
        (token, "the token (a rare word, such as sks)"),
        (class_word, "the word for what the photos show (such as dog)"),
    ):
        if not word:
            raise UserError(f"{name} is missing")
        if len(word) > MAX_WORD_CHARACTERS:
            raise UserError(f"{name} is too long; one to three words are enough")
        check_characters(word, name)
    return f"a photo of a {token} {class_word}", f"a photo of a {class_word}"


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
