"""Training form as a value: the table of its fields, and the settings that follow from them.

A field is one row of `TrainForm`. Widgets, settings and the labels in advice are made from the
rows. Facts that a row leaves out come from the table of settings. Settings that the form leaves
open are chosen as `train FOLDER WORD` does.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.devices import GIB, get_best_device, measure_apple_memory
from dreambooth_moslora.disk.paths import MAX_WORD_CHARACTERS
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.image_params import check_characters
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.photo_file import Photo
from dreambooth_moslora.photos.sidecars import clean_whitespace
from dreambooth_moslora.plan import defaults as plan
from dreambooth_moslora.settings import toy_bases
from dreambooth_moslora.settings.setting_names import SETTINGS
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.values import is_number

PRESET_FACTORS = {"quick": 0.5, "standard": 1.0, "thorough": 2.0}
"""Name -> how often each photo is shown, as a multiple of the recipe's number."""
FIRST_EXPERT_LINE = 20
"""Lines of the table from this one on are folded below “For experts”."""


@dataclass(frozen=True)
class FormField:
    """Row of the table: facts of a field beside its name and type."""

    default: Any
    label: str
    info: str = ""
    """Help beside it (default: that of its setting)."""
    line: int = 0
    """Line below “More settings”, from the top; fields may share a line. 0: elsewhere."""
    setting: str = ""
    """Setting that it fills; "" if the form does more with it."""
    choices: Mapping[str, str] = field(default_factory=dict)
    """Value -> label of radio buttons (default: the values of its setting)."""
    always: bool = False
    """Whether the run gets its value even if unchanged."""
    switch_values: tuple[str, str] | None = None
    """Values of the setting for a tick box that is off, and on."""
    hides_for_toys: bool = False
    """Whether it is hidden for the embedded base, which does not use it."""
    updates_photos: bool = False
    """Whether it decides the crops or the steps, so that the photos are shown again after it."""
    names_subject: bool = False
    """Whether it describes the photos' subject: it is kept with them, and cleared for a new one."""
    at_first: Callable[[str], Any] | None = None
    """Function from the base's name to the first value, if the base decides it."""
    unused_for: tuple[str, ...] = ()
    """Kinds of subject for which it is hidden, as they do not use it."""
    fetched: str = ""
    """Note beside a tick box that is off at first, as it downloads something from the hub."""
    elem_id: str = ""
    """Id on the page (default: its name)."""
    look: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the widget."""

    @property
    def setting_facts(self) -> Mapping[str, Any]:
        """Return the facts of its setting in the table of settings."""
        return SETTINGS[self.setting].metadata if self.setting else {}

    @property
    def values(self) -> tuple[str, ...]:
        """Return the values to select from; none if any can be written."""
        if self.choices:
            return tuple(self.choices)
        if self.is_tick:
            return ()
        return tuple(self.setting_facts.get("choices") or ())

    @property
    def is_tick(self) -> bool:
        """Return whether it is a tick box; None as default: the base decides."""
        return self.default is None or isinstance(self.default, bool)

    @property
    def is_number(self) -> bool:
        return is_number(self.default) and not self.is_tick

    @property
    def is_by_recipe(self) -> bool:
        """Return whether an empty value, or 0, leaves it to the recipe, whose value it shows."""
        return bool(self.setting) and not (self.default or self.always or self.is_tick)

    def get_first_value(self, base: str) -> Any:
        """Return its first value on a page of that base."""
        if self.is_by_recipe:
            return get_recipe_settings(base)[self.setting]
        return self.at_first(base) if self.at_first else self.default


def make_field(default: Any, label: str, info: str = "", **facts: Any) -> Any:
    """Make a field of the form with the facts of a `FormField`."""
    row = FormField(default=default, label=label, info=info, **facts)
    return field(default=default, metadata={"row": row})


@lru_cache(maxsize=16)
def get_recipe_settings(base: str) -> dict[str, Any]:
    """Return the settings that a run on the base of this name has unless the form changes them."""
    choices = plan.Choices({"pretrained_model_name_or_path": base})
    resolution_px = TrainConfig.resolution
    with suppress(UserError):  # a base that cannot be used, which is reported when it is loaded
        plan.choose_recipe(choices, None)
        resolution_px = choices.base.resolution_px
    defaults = {name: row.default for name, row in SETTINGS.items()}
    return defaults | choices.settings | {"resolution": resolution_px}


def list_form_fields() -> dict[str, FormField]:
    """Map names to the fields of the form, in the table's order."""
    return {item.name: item.metadata["row"] for item in fields(TrainForm)}


@dataclass(frozen=True)
class TrainForm:
    """Values of the training form. Empty ones mean the recipe's value, as 0 does in a number."""

    token: str = make_field(
        plan.DEFAULT_TOKEN,
        label="Token",
        info="the rare word that calls your subject",
        line=20,
        setting="token",
        unused_for=("style",),
        names_subject=True,
    )
    class_word: str = make_field(
        "",
        label="In one word",
        names_subject=True,
        look={"placeholder": "dog, teapot, woman, drawing …"},
    )
    run_name: str = make_field(
        "",
        label="Name of the run",
        info="of the run and its files; or empty",
        line=3,
        names_subject=True,
    )
    preset: str = make_field(
        "standard",
        label="Length",
        info="how often each photo is shown: half the usual, the usual, twice",
        line=2,
        choices=dict(zip(PRESET_FACTORS, PRESET_FACTORS)),
        updates_photos=True,
    )
    prior_preservation: bool = make_field(
        True,
        label="Keep the class",
        info="other dogs stay other dogs; without it all turn into yours; slower",
        line=8,
        setting="with_prior_preservation",
        elem_id="prior",
        unused_for=("style",),
    )
    rank: int = make_field(
        0,
        label="Rank",
        info="room for detail; more makes a larger file",
        line=23,
        setting="rank",
    )
    learning_rate: float = make_field(
        0.0,
        label="Learning rate",
        info="too much burns the pictures; 1 with Prodigy",
        line=23,
        setting="learning_rate",
    )
    steps: int = make_field(
        0,
        label="Steps",
        info="an exact number, in place of the length",
        line=4,
        setting="max_train_steps",
        updates_photos=True,
        elem_id="train_steps",
        look={"placeholder": "by the length"},
    )
    batch_size: int = make_field(
        0,
        label="Batch size",
        info="photos at once; more needs more memory",
        line=4,
        setting="train_batch_size",
        updates_photos=True,
    )
    resolution: int = make_field(
        0,
        label="Resolution",
        info="side of the crops, px; less is faster",
        line=4,
        setting="resolution",
        updates_photos=True,
    )
    sample_prompts: str = make_field(
        "",
        label="Sample prompts",
        info="of the pictures during the run, one a line; or empty",
        line=10,
        names_subject=True,
        look={"placeholder": "a photo of a sks dog on the beach", "lines": 2},
    )
    optimizer: str = make_field(
        "",
        label="Optimizer",
        info="Prodigy finds its own rate",
        line=24,
        setting="optimizer",
    )
    mixer: str = make_field(
        "orthogonal",
        label="Mixer",
        info="how the two halves are joined; “none” is plain LoRA",
        line=24,
        setting="mixer",
        always=True,
    )
    seed: int = make_field(
        0,
        label="Seed",
        info="another number, another run and other crops",
        line=20,
        setting="seed",
        always=True,
        updates_photos=True,
        elem_id="train_seed",
    )
    make_masks: bool | None = make_field(
        None,
        label="Make masks",
        info="finds the subject in photos that have none",
        line=5,
        setting="masks",
        switch_values=("given", "auto"),
        at_first=toy_bases.is_toy,
        fetched="CLIPSeg comes",
        unused_for=("style",),
    )
    memory: str = make_field(
        "auto",
        label="Memory",
        info="what to save memory with; the last needs least",
        line=24,
        setting="memory",
        always=True,
        hides_for_toys=True,
    )
    prior_weight: float = make_field(
        0.0,
        label="Prior weight",
        info="how firmly the class is kept",
        line=22,
        setting="prior_loss_weight",
        unused_for=("style",),
    )
    unmasked_weight: float = make_field(
        0.2,
        label="Weight outside the mask",
        info="0: the surroundings are not learned at all",
        line=22,
        setting="unmasked_weight",
        always=True,
    )
    scores: bool | None = make_field(
        None,
        label="Scores",
        info="measures likeness on the way and keeps the best step",
        line=9,
        at_first=plan.has_encoders,
        fetched="CLIP and DINOv2 are not here and come, 2 GB,",
    )
    make_captions: bool = make_field(
        False,
        label="Write captions at the start",
        info="says what surrounds the subject in photos without a caption; the toy invents it of "
        "what is no toy",
        line=6,
        setting="captions",
        switch_values=("given", "auto"),
        fetched="Qwen3-VL comes",
    )
    subject: str = make_field(
        "thing",
        label="Subject",
        info="a person is known by the face, a style by how things look",
        line=1,
        setting="subject",
        updates_photos=True,
        names_subject=True,
        choices={"thing": "object", "person": "person", "style": "style"},
    )
    describe: str = make_field(
        "",
        label="What may change",
        info="such as hair, clothes: captions written at the start say it; the person's other "
        "looks are left out, so that they are learned",
        line=1,
        look={"visible": False, "min_width": 240},
        unused_for=("thing", "style"),
        names_subject=True,
    )

    def check_words(self) -> None:
        """Raise UserError if the token or class word is missing or too long."""
        labels = {
            "token": "the token (a rare word, such as sks)",
            "class_word": "the word for what the photos show (such as dog)",
        }
        for key, name in labels.items():
            if self.subject in list_form_fields()[key].unused_for:
                continue
            word = str(getattr(self, key) or "").strip()
            if not word:
                raise UserError(f"{name} is missing")
            if len(word) > MAX_WORD_CHARACTERS:
                raise UserError(f"{name} is too long; one to three words are enough")
            check_characters(word, name)

    def build_prompts(self, base: str) -> tuple[str, str | None]:
        """Return the subject's prompt and the class prompt, None if no class is preserved.

        `base` is the name of the page's base. Raises UserError for a token or class word that no
        run can use.
        """
        self.check_words()
        choices = plan.Choices(
            self.collect_changed_settings(base) | {"pretrained_model_name_or_path": base}
        )
        plan.choose_prompts(choices, clean_whitespace(self.class_word))
        return choices.all_settings["instance_prompt"], choices.all_settings.get("class_prompt")

    def choose_settings(
        self,
        base: str,
        resolution_px: int,
        photos_dir: Path,
        run_dir: Path,
        *,
        photos: Sequence[Photo] = (),
        is_queued: bool = False,
    ) -> plan.Choices:
        """Choose settings as the command does for these photos and words.

        - `base` is the name of the page's base, and `resolution_px` its side, which a resolution
          in the form replaces.
        - `photos_dir` has the photos.
        - `run_dir` is the run's folder, which need not exist.
        - `photos` are those of `photos_dir` that can be used, if they were read already.
        - With `is_queued` the run begins when all others have ended, and has their memory.

        Raises UserError for a form or photos that no run can use.
        """
        # The form's own values come first, then those of the base's recipe.
        resolution_px = self.get_resolution(resolution_px)
        choices = plan.Choices(self.collect_settings(base, resolution_px, photos_dir, run_dir))
        scores_choice = self.scores
        # The embedded base needs no GPU, whatever its memory.
        free_gib = None if toy_bases.is_toy(base) else measure_free_gib(is_later=is_queued)
        exposures = plan.choose_recipe(choices, free_gib)
        # The settings that follow from the words, the photos, and the files on this machine.
        plan.choose_prompts(choices, clean_whitespace(self.class_word))
        photos = list(photos) or find_usable_photos(photos_dir, resolution_px)
        plan.choose_steps(choices, round(PRESET_FACTORS[self.preset] * exposures), photos)
        if scores_choice == plan.has_encoders(base):
            scores_choice = None
        plan.choose_scores(choices, photos, scores_choice)
        return choices

    def get_resolution(self, resolution_px: int) -> int:
        """Return the side of the crops, px: the form's, or else the base's `resolution_px`."""
        return int(self.resolution or resolution_px)

    def collect_settings(
        self, base: str, resolution_px: int, photos_dir: Path, run_dir: Path
    ) -> dict[str, Any]:
        """Return the form's own values, under the names of TrainConfig.

        Arguments are those of `choose_settings`. Raises UserError.
        """
        self.check_words()
        check_characters(str(self.describe or ""), "what may change")
        settings = {
            "pretrained_model_name_or_path": base,
            # The variant of the files that the page itself has loaded.
            "variant": Base.find(base).local_variant,
            "output_dir": str(run_dir),
            "resolution": resolution_px,
            "instance_data_dir": str(photos_dir),
            **self.collect_changed_settings(base),
        }
        looks = str(self.describe or "").replace(",", " ").split()
        if looks and self.subject == "person":
            settings["describe"] = looks
        lines = map(clean_whitespace, str(self.sample_prompts or "").splitlines())
        if sample_prompts := list(filter(None, lines)):
            settings["validation_prompt"] = sample_prompts
        return settings

    def collect_changed_settings(self, base: str) -> dict[str, Any]:
        """Return the settings that differ from the first values of their fields."""
        settings = {}
        for name, row in list_form_fields().items():
            # Skip a field that fills no setting, or is left to the recipe.
            value = getattr(self, name)
            value = clean_whitespace(value) if isinstance(value, str) else value
            is_by_recipe = value is None or (row.is_by_recipe and not value)
            is_hidden = self.subject in row.unused_for or (
                row.hides_for_toys and toy_bases.is_toy(base)
            )
            if not row.setting or is_by_recipe or is_hidden:
                continue
            if row.always or value != row.get_first_value(base):
                settings[row.setting] = (
                    row.switch_values[bool(value)] if row.switch_values else value
                )
        return settings


PRIOR_FLAGS_PATTERN = r"--with_prior_preservation --prior adapter_off --class_prompt \"[^\"]*\""
"""Pattern of the flags with which advice preserves the class."""


def replace_flags(advice: str) -> str:
    """Replace flags in advice, or in an error, by the form's labels; other flags stay."""
    # Pattern of a flag -> the label that replaces it.
    rows = [row for row in list_form_fields().values() if row.setting]
    labels = {
        r"--exposures_per_photo \d+": "a greater “Length”, or more “Steps”",
        r"give the next training --evaluate_steps \d+": "tick “Scores” for the next training",
        PRIOR_FLAGS_PATTERN: f"“{list_form_fields()['prior_preservation'].label}”",
    }
    for row in rows:
        if row.switch_values:
            labels[f"--{row.setting} {row.switch_values[1]}"] = f"“{row.label}”"
        elif row.is_number:
            labels[rf"--{row.setting} ([\d.e-]+)"] = rf"“{row.label}” \1"
    # A flag without its value, as in errors.
    labels |= {rf"--{row.setting}\b": f"“{row.label}”" for row in rows}
    for flag, label in labels.items():
        advice = re.sub(flag, label, advice)
    return advice


def measure_free_gib(*, is_later: bool = False) -> float | None:
    """Measure GPU memory for a run, GiB; None without a GPU.

    With `is_later` the run begins when all others have ended.
    """
    import torch

    # On Apple machines the CPU and the GPU share the memory.
    if get_best_device().type == "mps":
        limit_gib, used_gib = measure_apple_memory()
        return limit_gib if is_later else limit_gib - used_gib
    if not torch.cuda.is_available():
        return None
    # The memory that this process has reserved is released before the run begins.
    free_gib, total_gib = torch.cuda.mem_get_info()
    return (total_gib if is_later else free_gib + torch.cuda.memory_reserved()) / GIB


def find_usable_photos(photos_dir: Path, resolution_px: int) -> list[Photo]:
    """Find the usable photos. Raises UserError if there is none."""
    photos = find_photos(photos_dir, "", resolution_px).photos
    if not photos:
        raise UserError("none of the photos can be used; the reasons are shown below them")
    return photos
