"""The training form as a value: the table of its fields, and the settings that follow from them.

A field is one row of `TrainForm`. Widgets, settings, the form of an earlier run and the form's
words in advice are made from the rows. What a row leaves out is as the table of settings has it.
What the form leaves open is chosen as `train FOLDER WORD` does.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.machine import GIB, apple_gib, best_device
from dreambooth_moslora.disk.paths import MAX_WORD_CHARACTERS
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.params import check_characters
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.photo_file import Photo
from dreambooth_moslora.plan import choices as plan
from dreambooth_moslora.plan.checks import own_bucket_step
from dreambooth_moslora.settings import toys
from dreambooth_moslora.settings.table import SETTINGS, TrainConfig
from dreambooth_moslora.ui.photo_copies import kept_photos
from dreambooth_moslora.values import is_number

PRESETS = {"quick": 0.5, "standard": 1.0, "thorough": 2.0}
"""Name -> how often each photo is shown, as a multiple of what the recipe says."""
TOKENS_RATE = 1e-3
"""Learning rate of new tokens. The trainer's own default, diffusers', hardly moves them."""
EXPERT = 20
"""Lines of the table from this one on are folded below “For experts”."""
NEW_TOKENS = (
    "learns the token anew in both text encoders, beside the adapter; "
    "on the toys likeness did not rise"
)
"""Help of the tick for new tokens."""


@dataclass(frozen=True)
class FormField:
    """What the table says of a field beside its name and type."""

    default: Any
    label: str
    info: str = ""
    """Help beside it (default: that of its setting)."""
    line: int = 0
    """Its line below “More settings”, from the top; several fields may share one. 0: elsewhere."""
    setting: str = ""
    """The setting that it fills; "" if the form does more with it."""
    choices: Collection[str] | Mapping[str, str] = ()
    """Its values, or value -> label (default: those of its setting)."""
    most: float | None = None
    """The most that it takes (default: the setting's bound)."""
    kind: str = ""
    """`radio` or `slider`; else by its values."""
    required: bool = False
    """Whether the API's argument has no default."""
    always: bool = False
    """Whether the run is given its value even where that is as at first; else 0 is “by recipe”."""
    needs: str = ""
    """A tick without which it means nothing."""
    box: str = ""
    """Id of the box around its line, which is shown while what it needs is ticked."""
    words: tuple[str, str] | None = None
    """Values of the setting for a tick that is off, and on."""
    of_files: bool = False
    """Whether the embedded base has no use for it."""
    of_family: str = ""
    """The fact of the base's family without which it is not shown."""
    at_first: Callable[[str], Any] | None = None
    """From the base's name to the first value, if the base decides it."""
    fetched: str = ""
    """What is told where a tick is off at first, as it takes something from the hub."""
    title: str = ""
    """Its name in an error (default: the label)."""
    elem_id: str = ""
    """Its id on the page (default: its name)."""
    look: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the widget."""

    @property
    def row(self) -> Mapping[str, Any]:
        """What the table of settings says of its setting."""
        return SETTINGS[self.setting].metadata if self.setting else {}

    @property
    def values(self) -> tuple[str, ...]:
        """The values that can be chosen; none where any can be written."""
        if self.choices:
            return tuple(self.choices)
        if self.is_tick:
            return ()
        return tuple(self.row.get("choices") or ())

    @property
    def limit(self) -> float | None:
        """The most that a number may be."""
        return self.row.get("high") if self.most is None else self.most

    @property
    def is_tick(self) -> bool:
        """Whether it is on or off; None as default: the base decides."""
        return self.default is None or isinstance(self.default, bool)

    @property
    def is_number(self) -> bool:
        return is_number(self.default) and not self.is_tick

    @property
    def by_recipe(self) -> bool:
        """Whether 0, or on the page an empty field, means what the recipe says."""
        return self.is_number and bool(self.setting) and not self.always and not self.default

    def first(self, base: str) -> Any:
        """Its first value on a page of that base."""
        return self.at_first(base) if self.at_first else self.default

    def checked(self, name: str, value: Any) -> Any:
        """The value of the field of that name, as its type. Raises UserError."""
        # A tick, or one of some values.
        if self.is_tick:
            if value not in (True, False, None):
                raise UserError(f"{name} must be true or false, not {value!r:.30}")
            return value if self.default is None else bool(value)
        if self.values and (not isinstance(value, str) or value not in self.values):
            raise UserError(f"there is no {name} {value!r:.30}; choose {', '.join(self.values)}")
        if not self.is_number:
            return value
        # A number. An empty field is 0.
        value = 0 if value is None else value
        is_whole = isinstance(self.default, int)
        is_inside = is_number(value) and 0 <= value <= self.limit
        if not is_inside or (is_whole and not float(value).is_integer()):
            title = self.title or self.label.lower()
            what = f"{title} must be a whole" if is_whole else f"the {title} must be a"
            raise UserError(f"{what} number from 0 to {self.limit}, not {value!r:.30}")
        return type(self.default)(value)


def asked(default: Any, label: str, info: str = "", **facts: Any) -> Any:
    """A field of the form with the facts of a `FormField`."""
    row = FormField(default=default, label=label, info=info, **facts)
    return field(default=default, metadata={"row": row})


def rows() -> dict[str, FormField]:
    """The fields of the form by name, in the API's order."""
    return {item.name: item.metadata["row"] for item in fields(TrainForm)}


TOO_MANY_CAPTIONS = "{} captions for {} photos: one photo could not be read; leave out its line"
"""Told when a line of captions would be another photo's."""


def prompts_of(token: str, class_word: str) -> tuple[str, str]:
    """A subject's and its class's prompt, such as "a photo of a sks dog" and "a photo of a dog".

    Raises UserError for missing or too long words.
    """
    token = " ".join(str(token or "").split())
    class_word = " ".join(str(class_word or "").split())
    wanted = (
        (token, "the token (a rare word, such as sks)"),
        (class_word, "the word for what the photos show (such as dog)"),
    )
    for word, name in wanted:
        if not word:
            raise UserError(f"{name} is missing")
        if len(word) > MAX_WORD_CHARACTERS:
            raise UserError(f"{name} is too long; one to three words are enough")
        check_characters(word, name)
    return f"a photo of a {token} {class_word}", f"a photo of a {class_word}"


@dataclass(frozen=True)
class TrainForm:
    """All that the form asks.

    The fields' names and order are those of the API's arguments. 0 in a number, and None, mean what
    the recipe says.
    """

    token: str = asked(
        plan.TOKEN,
        label="Token",
        info="the rare word that calls your subject",
        line=20,
    )
    class_word: str = asked(
        "",
        label="In one word",
        required=True,
        look={"placeholder": "dog, teapot, woman, drawing …"},
    )
    run_name: str = asked(
        "",
        label="Name of the run",
        info="of the run and its files; or empty",
        line=3,
    )
    preset: str = asked(
        "standard",
        label="Length",
        info="how often each photo is shown: half the usual, the usual, twice",
        line=2,
        choices=PRESETS,
        kind="radio",
    )
    prior_preservation: bool = asked(
        True,
        label="Keep the class",
        info="other dogs stay other dogs; without it all turn into yours; slower",
        line=8,
        setting="with_prior_preservation",
        elem_id="prior",
    )
    captions: str = asked(
        "",
        label="Captions",
        info="one line for each photo, in order; may be left out",
        line=7,
        look={"visible": False},
    )
    rank: int = asked(
        0,
        label="Rank",
        info="room for detail; more makes a larger file",
        line=23,
        setting="rank",
        most=256,
    )
    learning_rate: float = asked(
        0.0,
        label="Learning rate",
        info="size of a step; too much burns the pictures",
        line=23,
        setting="learning_rate",
        most=10,
    )
    steps: int = asked(
        0,
        label="Steps",
        info="or an exact number of steps; empty: as the length says",
        line=4,
        setting="max_train_steps",
        most=100_000,
        elem_id="train_steps",
    )
    mixer: str = asked(
        "orthogonal",
        label="Mixer",
        info="how the two halves are joined; “none” is plain LoRA",
        line=24,
        setting="mixer",
        always=True,
    )
    seed: int = asked(
        0,
        label="Seed",
        info="another number, another run and other crops",
        line=20,
        setting="seed",
        most=2**32 - 1,
        always=True,
        elem_id="train_seed",
    )
    make_masks: bool | None = asked(
        None,
        label="Make masks",
        info="finds the subject in photos that have none",
        line=5,
        setting="masks",
        words=("given", "auto"),
        at_first=toys.is_toy,
        fetched="CLIPSeg comes",
    )
    memory: str = asked(
        "auto",
        label="Memory",
        info="what to save memory with; “nf4” needs least",
        line=24,
        setting="memory",
        always=True,
        of_files=True,
    )
    prior: str = asked(
        "adapter_off",
        label="Kept by",
        info="the base's own answers, or pictures of the class",
        line=21,
        setting="prior",
        choices={"adapter_off": "the base", "class_images": "class images"},
        needs="prior_preservation",
        elem_id="prior_by",
    )
    prior_weight: float = asked(
        0.0,
        label="Prior weight",
        info="how firmly the class is kept",
        line=21,
        setting="prior_loss_weight",
        most=100,
        needs="prior_preservation",
    )
    unmasked_weight: float = asked(
        0.2,
        label="Weight outside the mask",
        info="0: the surroundings are not learned at all",
        line=22,
        setting="unmasked_weight",
        always=True,
        kind="slider",
    )
    scores: bool | None = asked(
        None,
        label="Scores",
        info="measures likeness on the way and keeps the best step",
        line=9,
        at_first=plan.encoders_are_here,
        fetched="CLIP and DINOv2 are not here and come, 2 GB,",
    )
    make_captions: bool = asked(
        False,
        label="Write captions at the start",
        info="says what surrounds the subject in photos without a caption",
        line=6,
        setting="captions",
        words=("given", "auto"),
        fetched="Qwen3-VL comes",
    )
    new_tokens: bool = asked(
        False,
        label="New tokens",
        info=NEW_TOKENS,
        line=25,
        setting="train_text_encoder_ti",
        of_family="has_new_tokens",
    )
    tokens_begin_as: str = asked(
        "",
        label="They begin as",
        info="words like it; or empty",
        line=26,
        needs="new_tokens",
        box="token_box",
    )
    tokens_learning_rate: float = asked(
        TOKENS_RATE,
        label="Their learning rate",
        info="1e-4 to 1e-3",
        line=26,
        setting="text_encoder_lr",
        most=10,
        always=True,
        needs="new_tokens",
        box="token_box",
        title="learning rate of the new tokens",
        elem_id="tokens_rate",
    )

    def checked(self, name: str) -> Any:
        """The value of a field. Raises UserError."""
        return rows()[name].checked(name, getattr(self, name))

    def choices(
        self,
        base: str,
        resolution_px: int,
        photos_dir: Path,
        run_dir: Path,
        *,
        is_queued: bool = False,
    ) -> plan.Choices:
        """What the command would choose for these photos and words.

        - `base` is the name of the page's base, and `resolution_px` its side.
        - `photos_dir` has the photos.
        - `run_dir` is the run's folder, which need not exist.
        - With `is_queued` the run begins when all others have ended, and has their memory.

        Raises UserError for a form or photos that no run can use.
        """
        # The form's own values come first, and the base's recipe gives the others.
        choices = plan.Choices(self.given(base, resolution_px, photos_dir, run_dir))
        share = PRESETS[self.checked("preset")]
        wants_scores = self.checked("scores")
        exposures = plan.choose_recipe(choices, free_for(base, is_later=is_queued))
        # What follows from the words, from the photos, and from what is on this machine.
        plan.choose_words(choices, " ".join(str(self.class_word).split()))
        photos = usable_photos(photos_dir, resolution_px)
        plan.choose_steps(choices, round(share * exposures), photos)
        if wants_scores == plan.encoders_are_here(base):
            wants_scores = None
        plan.choose_scores(choices, photos, wants_scores)
        return choices

    def config(
        self, base: str, resolution_px: int, photos_dir: Path, run_dir: Path
    ) -> dict[str, Any]:
        """The settings of `choices`, which has the arguments. Raises UserError."""
        return self.choices(base, resolution_px, photos_dir, run_dir).all

    def given(
        self, base: str, resolution_px: int, photos_dir: Path, run_dir: Path
    ) -> dict[str, Any]:
        """The form's own values, under the names of TrainConfig.

        The arguments are those of `choices`. Raises UserError.
        """
        prompts_of(self.token, self.class_word)
        check_characters(str(self.captions or ""), "a caption")
        given = {
            "pretrained_model_name_or_path": base,
            # The files that the page itself has loaded.
            "variant": Base.find(base).variant_here,
            "output_dir": str(run_dir),
            "resolution": resolution_px,
            "instance_data_dir": str(photos_dir),
            **self.settings_given(base),
        }
        token = " ".join(str(self.token).split())
        if token != plan.TOKEN:
            given["token"] = token
        # What the new tokens begin as.
        concept = " ".join(str(self.tokens_begin_as or "").split())
        if self.new_tokens and concept:
            check_characters(concept, "what the new tokens begin as")
            given["initializer_concept"] = concept
        return given

    def settings_given(self, base: str) -> dict[str, Any]:
        """What the fields say of settings that differ from the first. Raises UserError."""
        given = {}
        for name, row in rows().items():
            # A field without a setting, or whose tick is off.
            if not row.setting or (row.needs and not getattr(self, row.needs)):
                continue
            # A field that is left to the recipe.
            value = self.checked(name)
            is_unsaid = value is None or (row.is_number and not row.always and not value)
            if is_unsaid or (row.of_files and toys.is_toy(base)):
                continue
            if row.always or value != row.first(base):
                given[row.setting] = row.words[bool(value)] if row.words else value
        return given

    def write_captions(self, photos_dir: Path) -> None:
        """Write each caption into a text file beside its photo; empty ones are skipped.

        Raises UserError for more lines than photos: some would be another photo's.
        """
        photos = kept_photos(photos_dir)
        lines = str(self.captions or "").rstrip().splitlines()
        if len(lines) > len(photos):
            raise UserError(TOO_MANY_CAPTIONS.format(len(lines), len(photos)))
        for photo, line in zip(photos, lines):
            if line.strip():
                photo.with_suffix(".txt").write_text(line.strip(), encoding="utf-8")


def values_from(said: Mapping[str, Any], base: str) -> dict[str, Any]:
    """The values, by name, of the fields that fill a setting.

    - `said` has settings; what it does not say is as at first.
    - `base` is the name of the page's base, on which first values may depend.
    """
    values: dict[str, Any] = {}
    for name, row in rows().items():
        if not row.setting:
            continue
        value = said.get(row.setting)
        # What is below a tick means nothing where that is off.
        if row.needs:
            tick = rows()[row.needs]
            if not said.get(tick.setting, tick.default):
                value = None
        if value is None or (row.values and value not in row.values):
            values[name] = row.first(base)
        else:
            values[name] = value == row.words[1] if row.words else value
    return values


PRIOR_FLAGS = r"--with_prior_preservation --prior adapter_off --class_prompt \"[^\"]*\""
"""How advice for the command line keeps the class."""


def in_the_forms_words(advice: str) -> str:
    """Flags of the command line as the form calls them; those that it has not stay."""
    # Pattern of a flag -> what is said in its place.
    words = {
        r"--exposures_per_photo \d+": "a greater “Length”, or more “Steps”",
        PRIOR_FLAGS: f"“{rows()['prior_preservation'].label}”",
    }
    for row in rows().values():
        if row.setting and row.words:
            words[f"--{row.setting} {row.words[1]}"] = f"“{row.label}”"
        elif row.setting and row.is_number:
            shown = rf"\1 as “{row.label}”" if row.kind == "slider" else rf"“{row.label}” \1"
            words[rf"--{row.setting} ([\d.e-]+)"] = shown
    for flag, said in words.items():
        advice = re.sub(flag, said, advice)
    return advice


def free_gib(*, is_later: bool = False) -> float | None:
    """GPU memory for a run, GiB; None without a GPU.

    With `is_later` the run begins when all others have ended.
    """
    import torch

    # Apple's memory is the CPU's, too.
    if best_device().type == "mps":
        most, used = apple_gib()
        return most if is_later else most - used
    if not torch.cuda.is_available():
        return None
    # What this process has reserved is given back before the run begins.
    free, whole = torch.cuda.mem_get_info()
    return (whole if is_later else free + torch.cuda.memory_reserved()) / GIB


def free_for(base: str, *, is_later: bool = False) -> float | None:
    """Free GPU memory for the choice of recipe, GiB.

    None without a GPU, and for the embedded base, which needs none.
    """
    return None if toys.is_toy(base) else free_gib(is_later=is_later)


def usable_photos(photos_dir: Path, resolution_px: int) -> list[Photo]:
    """The usable photos. Raises UserError where there is none."""
    photos = find_photos(photos_dir, "", resolution_px).photos
    if not photos:
        raise UserError("none of the photos can be used; the reasons are shown below them")
    return photos


def crop_config(
    base: str,
    resolution_px: int,
    photos_dir: Path,
    photos: Sequence[Photo],
    seed: Any = 0,
) -> TrainConfig:
    """The settings that decide the crops, as `TrainForm.choices` would choose them.

    - `base` is the name of the page's base, and `resolution_px` its side.
    - `photos_dir` has `photos`, which need no words yet.
    - `seed` is the form's. Raises UserError for one that is no whole number.
    """
    _, recipe = plan.recipe_settings(Base.find(base))
    own = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": str(photos_dir),
        "instance_prompt": "a photo",
        "resolution": resolution_px,
        "seed": rows()["seed"].checked("seed", seed),
    }
    # The shapes follow from the photos, and their steps from the base.
    choices = plan.Choices(recipe | own)
    plan.choose_shapes(choices, photos)
    config = TrainConfig.from_dict(choices.all)
    return replace(config, **own_bucket_step(config, Base.of(config)))
