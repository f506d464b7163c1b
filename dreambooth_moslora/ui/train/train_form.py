"""The training form as a value: the table of its fields, and the settings that `train FOLDER WORD`
chooses from them.

A field is one row of `TrainForm`: widgets, settings, the form of an earlier run, “Train like” and
the form's words in advice are made from the rows; what a row leaves out is as the table of settings
has it.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.machine import GIB, apple_gib, best_device
from dreambooth_moslora.disk.contents import file_digest
from dreambooth_moslora.disk.paths import MAX_WORD_CHARACTERS
from dreambooth_moslora.disk.run_folder import NONE
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.params import check_characters
from dreambooth_moslora.photos.folder import MOST_BYTES, TOO_LONG, find_photos
from dreambooth_moslora.photos.photo_file import Photo
from dreambooth_moslora.plan import choices as plan
from dreambooth_moslora.plan.checks import own_bucket_step
from dreambooth_moslora.settings import rules, sources, toys
from dreambooth_moslora.settings.table import OF_PLANS, SETTINGS, TrainConfig
from dreambooth_moslora.ui.photo_copies import kept_photos
from dreambooth_moslora.values import is_number

LENGTHS = ("max_train_steps", "exposures_per_photo", "num_train_epochs")
OF_MACHINE = (
    *("mixed_precision", *OF_PLANS, "caching"),
    *("allow_tf32", "compile", "sample_batch_size", "prior_generation_precision"),
)
PRESETS = {"quick": 0.5, "standard": 1.0, "thorough": 2.0}
"""Name -> how often each photo is shown, as a multiple of what the recipe says."""
TOKENS_RATE = 1e-3  # The trainer's own default, diffusers', hardly moves new tokens
BY_RECIPE = "empty: by recipe"
NEW_TOKENS = "learns the token anew in both text encoders, beside the adapter; on the toys likeness did not rise"


@dataclass(frozen=True)
class FormField:
    """What the table says of a field beside its name and type."""

    default: Any
    label: str
    info: str = ""  # default: the help of its setting
    # its line below “More settings”, from the top, where several may stand side by side; 0:
    # elsewhere
    line: int = 0
    setting: str = ""  # the setting that it fills; "" if the form does more with it
    # values, or value -> its label (default: those of its setting)
    choices: Collection[str] | Mapping[str, str] = ()
    most: float | None = None  # the most that the field takes (default: the setting's bound)
    # radio, slider, or list: names that the page knows; else the widget follows from the values
    kind: str = ""
    required: bool = False  # the API's argument has no default
    # the run is given its value even where that is as at first; else 0 means “by recipe”
    always: bool = False
    needs: str = ""  # a tick without which it means nothing
    box: str = ""  # id of the box around its line, which is shown while what it needs is ticked
    words: tuple[str, str] | None = None  # values of the setting for a tick that is off, and on
    of_files: bool = False  # not for the embedded base
    of_family: str = ""  # the fact of the base's family without which it is not shown
    at_first: Callable[[str], Any] | None = None  # its first value by the base, if that decides
    # what is told where a tick is off at first, as it takes something from the hub
    fetched: str = ""
    title: str = ""  # its name in an error (default: the label)
    elem_id: str = ""  # its id on the page (default: its name)
    look: Mapping[str, Any] = field(default_factory=dict)  # further options of the widget

    @property
    def row(self) -> Mapping[str, Any]:
        """What the table of settings says of its setting."""
        return SETTINGS[self.setting].metadata if self.setting else {}

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(self.choices or (() if self.is_tick else self.row.get("choices") or ()))

    @property
    def limit(self) -> float | None:
        return self.row.get("high") if self.most is None else self.most

    @property
    def is_tick(self) -> bool:
        return self.default is None or isinstance(self.default, bool)

    @property
    def is_number(self) -> bool:
        return is_number(self.default) and not self.is_tick

    @property
    def by_recipe(self) -> bool:
        """Whether 0, or on the page an empty field, means what the recipe says."""
        return self.is_number and bool(self.setting) and not self.always and not self.default

    def first(self, base: str) -> Any:
        return self.at_first(base) if self.at_first else self.default

    def checked(self, name: str, value: Any) -> Any:
        """The value of the field of that name, as its type. Raises UserError."""
        title = self.title or self.label.lower()
        if self.is_tick:
            if value not in (True, False, None):
                raise UserError(f"{name} must be true or false, not {value!r:.30}")
            return value if self.default is None else bool(value)
        if self.values and (not isinstance(value, str) or value not in self.values):
            raise UserError(f"there is no {name} {value!r:.30}; choose {', '.join(self.values)}")
        if not self.is_number:
            return value
        value, is_whole = 0 if value is None else value, isinstance(self.default, int)
        if (
            not is_number(value)
            or not 0 <= value <= self.limit
            or (is_whole and not float(value).is_integer())
        ):
            what = (
                f"{title} must be a whole number" if is_whole else f"the {title} must be a number"
            )
            raise UserError(f"{what} from 0 to {self.limit}, not {value!r:.30}")
        return type(self.default)(value)


def asked(default: Any, label: str, info: str = "", **facts: Any) -> Any:
    """A field of the form with the facts of a `FormField`."""
    return field(default=default, metadata={"row": FormField(default, label, info, **facts)})


def rows(form: type) -> dict[str, FormField]:
    """The fields of the form by name, in the API's order."""
    return {item.name: item.metadata["row"] for item in fields(form) if item.metadata}


TOO_MANY_CAPTIONS = "{} captions for {} photos{}: one photo could not be read; leave out its line"
DIGEST = re.compile("[0-9a-f]{64}")
MOST_SUBJECTS = 4
TOKENS = ("sks", "zwx", "ohwx", "xjy")  # The default rare word of each further subject


@dataclass(frozen=True)
class SubjectWords:
    """The form's values for one subject. `captions`: one line for each photo, in order, or as the
    page sends them: each after the digest of its photo and a colon. `tokens_begin_as`: if there are
    any."""

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


def photos_of(photos_dir: Path, number: int) -> list[Path]:
    """`kept_photos` of that subject."""
    return kept_photos(folder_of(photos_dir, number))


def table_of(number: int, words: SubjectWords, photos_dir: Path) -> dict[str, str]:
    """The `[[subjects]]` table of subject `number`; `photos_dir` is the first one's. Raises
    UserError."""
    try:
        instance_prompt, class_prompt = prompts_of(words.token, words.class_word)
        check_captions(words.captions)
    except UserError as error:
        raise UserError(f"subject {number}: {error}") from error
    folder = str(folder_of(photos_dir, number))
    return {
        "instance_data_dir": folder,
        "instance_prompt": instance_prompt,
        "class_prompt": class_prompt,
    }


def check_captions(captions: Any) -> None:
    """Raises UserError for a line that cannot be written, or that is longer than the trainer reads."""
    check_characters(str(captions or ""), "a caption")
    for number, line in enumerate(str(captions or "").splitlines(), 1):
        if len(digest_and_caption(line)[1].encode()) > MOST_BYTES:
            raise UserError(f"the caption of photo {number} is {TOO_LONG}; shorten it")


def digest_and_caption(line: str) -> tuple[str, str]:
    """The digest is "" in a line of a program, which has only the caption."""
    digest, colon, caption = line.partition(":")
    return (digest, caption) if colon and DIGEST.fullmatch(digest) else ("", line)


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


@dataclass(frozen=True)
class TrainForm:
    """The fields' names and order are those of the API's arguments. 0 in a number, and None: as the
    recipe has it. `begin_with` and `like` name an adapter or a recipe that can be chosen on the
    page."""

    # fmt: off
    token: str = asked(plan.TOKEN, "Token", "a rare word", line=2)
    class_word: str = asked("", "What the photos show", required=True, look={"placeholder": "dog"})
    run_name: str = asked("", "Name of the run", "may be empty", line=2)
    preset: str = asked("standard", "Length", "half, once, twice the recipe's", line=5, choices=PRESETS, kind="radio")
    prior_preservation: bool = asked(True, "Keep the class", "without it, its whole kind turns into yours; slower",
        line=7, setting="with_prior_preservation", elem_id="prior")
    captions: str = asked("", "Captions", "one line for each photo, in order; may be left out",
        line=3, look={"visible": False})
    rank: int = asked(0, "Rank", BY_RECIPE, line=15, setting="rank", most=256)
    learning_rate: float = asked(0.0, "Learning rate", BY_RECIPE, line=15, setting="learning_rate", most=10)
    steps: int = asked(0, "Steps", "empty: by length",
        line=6, setting="max_train_steps", most=100_000, elem_id="train_steps")
    mixer: str = asked("orthogonal", "Mixer", "“none”: LoRA", line=16, setting="mixer", always=True)
    seed: int = asked(0, "Seed", "also of the crops",
        line=6, setting="seed", most=2**32 - 1, always=True, elem_id="train_seed")
    make_masks: bool | None = asked(None, "Make masks", "finds the subject in photos that have none",
        line=9, setting="masks", words=("given", "auto"), at_first=toys.is_toy, fetched="CLIPSeg comes")
    memory: str = asked("auto", "Memory", "nf4 needs least", line=16, setting="memory", always=True, of_files=True)
    prior: str = asked("adapter_off", "Kept by", "the base's own answers, or pictures of the class",
        line=8, setting="prior", choices={"adapter_off": "the base", "class_images": "class images"},
        needs="prior_preservation", elem_id="prior_by")
    prior_weight: float = asked(0.0, "Prior weight", BY_RECIPE,
        line=8, setting="prior_loss_weight", most=100, needs="prior_preservation")
    unmasked_weight: float = asked(0.2, "Weight outside the mask", "0: the surroundings are not learned at all",
        line=10, setting="unmasked_weight", always=True, kind="slider")
    scores: bool | None = asked(None, "Scores", "measures on the way and keeps the best step",
        line=11, at_first=plan.encoders_are_here, fetched="CLIP and DINOv2 are not here and come, 2 GB,")
    make_captions: bool = asked(False, "Write captions at the start", "says the surroundings of photos without a line",
        line=4, setting="captions", words=("given", "auto"), fetched="Qwen3-VL comes")
    new_tokens: bool = asked(False, "New tokens", NEW_TOKENS,
        line=12, setting="train_text_encoder_ti", of_family="has_new_tokens")
    tokens_begin_as: str = asked("", "They begin as", "words like it; or empty",
        line=13, needs="new_tokens", box="token_box")
    tokens_learning_rate: float = asked(TOKENS_RATE, "Their learning rate", "1e-4 to 1e-3",
        line=13, setting="text_encoder_lr", most=10, always=True, needs="new_tokens", box="token_box",
        title="learning rate of the new tokens", elem_id="tokens_rate")
    begin_with: str = asked(NONE, "Begin with", "an adapter to go on from, with these photos; “none”: from nothing",
        line=14, kind="list")
    like: str = asked(NONE, "Train like", "an adapter whose settings fill this form",
        line=1, kind="list", elem_id="train_like", look={"scale": 4})
    others: tuple[SubjectWords, ...] = ()
    # fmt: on

    @property
    def subjects(self) -> tuple[SubjectWords, ...]:
        return (
            SubjectWords(self.class_word, self.token, self.captions, self.tokens_begin_as),
            *self.others,
        )

    def checked(self, name: str) -> Any:
        """The value of a field. Raises UserError."""
        return rows(type(self))[name].checked(name, getattr(self, name))

    def choices(
        self,
        base: str,
        resolution_px: int,
        photos_dir: Path,
        run_dir: Path,
        *,
        is_queued: bool = False,
        recipe: sources.FoundRecipe | None = None,
    ) -> plan.Choices:
        """What the command would choose for these photos, in `folder_of` each subject, and words.
        Raises UserError."""
        given = self.given(base, resolution_px, photos_dir, run_dir, is_like=recipe is not None)
        share, wants_scores = PRESETS[self.checked("preset")], self.checked("scores")
        if recipe is None:
            choices = plan.Choices(given)
            exposures = plan.choose_recipe(choices, free_for(base, is_later=is_queued))
        else:
            choices = plan.Choices(taken_from(recipe, given, share) | given)
            exposures = plan.USUAL_EXPOSURES
            choices.say(f"settings like {self.like}, where the form says nothing else")
        if self.others:
            plan.choose_subjects(choices)
        else:
            plan.choose_words(choices, " ".join(str(self.class_word).split()))
        photos = usable_photos(photos_dir, resolution_px, len(self.subjects))
        plan.choose_steps(choices, round(share * exposures), photos)
        plan.choose_scores(
            choices, photos, None if wants_scores == plan.encoders_are_here(base) else wants_scores
        )
        return choices

    def config(
        self,
        base: str,
        resolution_px: int,
        photos_dir: Path,
        run_dir: Path,
        recipe: sources.FoundRecipe | None = None,
    ) -> dict[str, Any]:
        return self.choices(base, resolution_px, photos_dir, run_dir, recipe=recipe).all

    def given(
        self,
        base: str,
        resolution_px: int,
        photos_dir: Path,
        run_dir: Path,
        *,
        is_like: bool = False,
    ) -> dict[str, Any]:
        """The form's own values, under the names of TrainConfig. Raises UserError."""
        prompts_of(self.token, self.class_word)
        check_captions(self.captions)
        token = " ".join(str(self.token).split())
        return {
            "pretrained_model_name_or_path": base,
            "variant": Base.find(base).variant_here,  # the files that the page itself has loaded
            "output_dir": str(run_dir),
            "resolution": resolution_px,
            **self.settings_given(base, is_like=is_like),
            **self.photos_given(photos_dir),
            **({} if self.others else self.concept_of(self.subjects[0])),
            **({"token": token} if token != plan.TOKEN and not self.others else {}),
        }

    def settings_given(self, base: str, *, is_like: bool) -> dict[str, Any]:
        """What the fields say of settings; beside a file (`is_like`) even what is as at first.
        Raises UserError."""
        given = {}
        for name, row in rows(type(self)).items():
            if not row.setting or (row.needs and not getattr(self, row.needs)):
                continue
            value = self.checked(name)
            is_unsaid = value is None or (row.is_number and not row.always and not value)
            if is_unsaid or (row.of_files and toys.is_toy(base)):
                continue
            if row.always or is_like or value != row.first(base):
                given[row.setting] = row.words[bool(value)] if row.words else value
        return given

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
            raise UserError(
                f"two subjects are called “{twice}”; give each a token or a class of its own"
            )
        return {"subjects": tables}

    def concept_of(self, words: SubjectWords) -> dict[str, str]:
        """What the new tokens of a subject begin as, if the words say it. Raises UserError."""
        concept = " ".join(str(words.tokens_begin_as or "").split())
        if not (self.new_tokens and concept):
            return {}
        check_characters(concept, "what the new tokens begin as")
        return {"initializer_concept": concept}

    def write_captions(self, photos_dir: Path) -> None:
        """Write each caption into a text file beside its photo, if that is there; empty ones are
        skipped. Raises UserError for more lines without a digest than photos: some would be another
        photo's."""
        for number, words in enumerate(self.subjects, 1):
            photos, lines = (
                photos_of(photos_dir, number),
                str(words.captions or "").rstrip().splitlines(),
            )
            if "" not in (said := dict(map(digest_and_caption, lines))):
                lines = [said.get(file_digest(photo), "") for photo in photos]
            if len(lines) > len(photos):
                whose = f" of subject {number}" if self.others else ""
                raise UserError(TOO_MANY_CAPTIONS.format(len(lines), len(photos), whose))
            for photo, line in zip(photos, lines):
                if line.strip():
                    photo.with_suffix(".txt").write_text(line.strip(), encoding="utf-8")


def form_of(values: Mapping[str, Any], form: type[TrainForm] = TrainForm) -> TrainForm:
    """The form from all fields' values, by name. Raises UserError for words, or given photos,
    beyond the number of `subjects`."""
    count = values.get("subjects", 1)
    if isinstance(count, bool) or count not in range(1, MOST_SUBJECTS + 1):
        raise UserError(
            f"subjects must be a whole number from 1 to {MOST_SUBJECTS}, not {count!r:.30}"
        )
    others = []
    for number in range(2, MOST_SUBJECTS + 1):
        words = [
            str(values.get(named(name, number)) or "") for name in SubjectWords.__dataclass_fields__
        ]
        if number <= count:
            others.append(SubjectWords(*words))
        for name in ("class_word", "photos"):
            if number > count and str(values.get(named(name, number)) or "").strip():
                raise UserError(
                    f"with {named(name, number)}, subjects must be at least {number}, not {count}"
                )
    return form(
        **{name: values[name] for name in rows(form) if name in values}, others=tuple(others)
    )


def values_of(form: TrainForm) -> dict[str, Any]:
    """Of the widgets, by name: further subjects' fields are empty where the form has no such
    subject."""
    values = {name: getattr(form, name) for name in rows(type(form))} | {
        "subjects": len(form.subjects)
    }
    for number in range(2, MOST_SUBJECTS + 1):
        words = (
            form.subjects[number - 1]
            if number <= len(form.subjects)
            else SubjectWords("", TOKENS[number - 1])
        )
        values |= {named(name, number): value for name, value in vars(words).items()}
    return values


def values_from(
    said: Mapping[str, Any], base: str, form: type[TrainForm] = TrainForm
) -> dict[str, Any]:
    """Of the fields that fill a setting, by name; what the settings do not say is as at first."""
    values: dict[str, Any] = {}
    for name, row in rows(form).items():
        if row.setting:
            needed = rows(form)[row.needs] if row.needs else None
            value = (
                said.get(row.setting)
                if not needed or said.get(needed.setting, needed.default)
                else None
            )
            if value is None or (row.values and value not in row.values):
                values[name] = row.first(base)
            else:
                values[name] = value == row.words[1] if row.words else value
    return values


def values_like(
    recipe: sources.FoundRecipe | None, base: str, form: type[TrainForm] = TrainForm
) -> dict[str, Any]:
    """Of the widgets that a recipe speaks of, by name; those of None are all as at first."""
    values = values_from(recipe.settings if recipe else {}, base, form) | {
        "preset": TrainForm.preset
    }
    return {name: value for name, value in values.items() if not rows(form)[name].of_files}


PRIOR_FLAGS = r"--with_prior_preservation --prior adapter_off --class_prompt \"[^\"]*\""


def in_the_forms_words(advice: str, form: type[TrainForm] = TrainForm) -> str:
    """Flags of the command line as the form calls them; those that it has not stay."""
    words = {
        r"--exposures_per_photo \d+": "a greater “Length”, or more “Steps”",
        PRIOR_FLAGS: f"“{rows(form)['prior_preservation'].label}”",
    }
    for row in rows(form).values():
        if row.setting and row.words:
            words[f"--{row.setting} {row.words[1]}"] = f"“{row.label}”"
        elif row.setting and row.is_number:
            shown = rf"\1 as “{row.label}”" if row.kind == "slider" else rf"“{row.label}” \1"
            words[rf"--{row.setting} ([\d.e-]+)"] = shown
    for flag, said in words.items():
        advice = re.sub(flag, said, advice)
    return advice


def left_out(recipe: sources.FoundRecipe) -> dict[str, Any]:
    """The recipe's settings that are not taken: the base has its own resolution, and the machine
    its own memory."""
    without = () if rules.version_of("bitsandbytes") else ("use_8bit_adam",)
    return {
        name: recipe.settings[name]
        for name in ("resolution", *OF_MACHINE, *without)
        if name in recipe.settings
    }


def taken_from(
    recipe: sources.FoundRecipe, given: Mapping[str, Any], share: float = 1.0
) -> dict[str, Any]:
    """The recipe's settings that are neither given nor left out; its length is multiplied by
    `share`."""
    taken = sources.unless_given(recipe.settings, {**left_out(recipe), **given})
    return taken | lengths_in(taken, share)


def lengths_in(settings: Mapping[str, Any], share: float) -> dict[str, int]:
    """The settings of a run's length, multiplied by `share`."""
    return {name: max(1, round(share * settings[name])) for name in LENGTHS if settings.get(name)}


def free_gib(*, is_later: bool = False) -> float | None:
    """GPU memory for a run, GiB, or for one that begins when all others have ended (`is_later`);
    None: no GPU."""
    import torch

    if best_device().type == "mps":
        most, used = apple_gib()
        return most if is_later else most - used
    if not torch.cuda.is_available():
        return None
    free, whole = torch.cuda.mem_get_info()
    return (whole if is_later else free + torch.cuda.memory_reserved()) / GIB


def free_for(base: str, *, is_later: bool = False) -> float | None:
    """Free GPU memory for the choice of recipe, GiB; None for the embedded base, which needs none."""
    return None if toys.is_toy(base) else free_gib(is_later=is_later)


def usable_photos(photos_dir: Path, resolution_px: int, subjects: int = 1) -> list[Photo]:
    """The usable photos of the first `subjects` subjects. Raises UserError for a subject without
    any."""
    found = []
    for number in range(1, subjects + 1):
        folder = folder_of(photos_dir, number)
        if number > 1 and not kept_photos(folder):
            raise UserError(f"add some photos of subject {number} first")
        photos = find_photos(folder, "", resolution_px).photos
        if not photos:
            whose = f" of subject {number}" if number > 1 else ""
            raise UserError(
                f"none of the photos{whose} can be used; the reasons are shown below them"
            )
        found += [replace(photo, subject=number - 1) for photo in photos]
    return found


def crop_config(
    base: str,
    resolution_px: int,
    photos_dir: Path,
    photos: Sequence[Photo],
    seed: Any = 0,
    like: sources.FoundRecipe | None = None,
) -> TrainConfig:
    """The settings that decide the crops, like those of `TrainForm.choices`; the words are not
    needed."""
    if like:
        recipe = taken_from(like, {"with_prior_preservation": False})
    else:
        _, recipe = plan.recipe_settings(Base.find(base), free_for(base))
    own = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": str(photos_dir),
        "instance_prompt": "a photo",
        "resolution": resolution_px,
        "seed": rows(TrainForm)["seed"].checked("seed", seed),
    }
    choices = plan.Choices(recipe | own)
    plan.choose_shapes(choices, photos)
    config = TrainConfig.from_dict(choices.all)
    return replace(config, **own_bucket_step(config, Base.of(config)))
