"""Choose the settings of a run when only photos and a word are given, for the command line and the
page alike.

    user's settings --choose_…--> chosen settings and lines about them

A setting of the user always wins.

The base's family decides the recipe from `assets/configs`; how memory is saved is left to `--memory
auto`.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dreambooth_moslora.base import devices
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.devices import get_world_size
from dreambooth_moslora.base.model_files import MAX_SMALL_BASE_PX
from dreambooth_moslora.disk.paths import get_assets_folder
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.plan.steps import (
    MIN_EXPOSURES,
    count_sample_images,
    count_scorings,
    plan_steps,
)
from dreambooth_moslora.settings import config_files, family_facts, field_facts, toy_bases
from dreambooth_moslora.settings.metric_kinds import CLIP_REPO, DINO_REPO, SFACE
from dreambooth_moslora.settings.setting_names import EXCLUSIONS, get_flag_name
from dreambooth_moslora.settings.subject_kinds import SUBJECT_KINDS
from dreambooth_moslora.settings.train_config import TrainConfig

if TYPE_CHECKING:
    from dreambooth_moslora.photos.folder import PhotoReport
    from dreambooth_moslora.photos.photo_file import Photo

DEFAULT_TOKEN = "sks"
"""The rare word, if none is given."""
MIN_OBLONG_RATIO = (
    1.1  # Photos whose sides differ by more than this factor are cropped in their own shapes.
)
DEFAULT_EXPOSURES = 200
"""Exposures of a photo: the recipes show each of five photos 192 to 400 times."""
RECIPE_PHOTOS = 5
"""A recipe's number of steps is meant for this many photos; both give the exposures of each."""
RUN_SETTINGS = (
    "pretrained_model_name_or_path",
    "instance_data_dir",
    "output_dir",
    "instance_prompt",
    "class_prompt",
    "max_train_steps",
)
"""What a recipe names that is another run's, or is chosen here."""
FACE_CROPS_PER_PHOTO = 4
"""Of each photo of a person: about half of them come near the face."""
NO_SAMPLE_SETTINGS = {"num_validation_images": 0, "validation_steps": None}
"""Chosen on a CPU, where each picture of a large base takes minutes."""


@dataclass
class Choices:
    """Settings that were chosen for the user, and notes about them.

    `notes` has a sentence about each choice and its flags; `photo_report` is set if the photos were
    read for one. `closing_lines` are logged just before the run begins. `is_verbose` is
    `--verbose`.
    """

    user_settings: Mapping[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    photo_report: "PhotoReport | None" = None
    closing_lines: Sequence[str] = ()
    is_verbose: bool = False

    def add(self, text: str, *flags: str, **settings: Any) -> None:
        """Choose these settings unless the user set them. `text` is noted if any was chosen."""
        new_settings = {
            name: value for name, value in settings.items() if name not in self.user_settings
        }
        self.settings |= new_settings
        if new_settings and text:
            self.add_note(text, *flags)

    def add_note(self, text: str, *flags: str) -> None:
        self.notes.append((text, flags))

    @property
    def lines(self) -> list[str]:
        """Return the sentences with their flags, for the terminal."""
        lines = []
        for text, flags in self.notes:
            flag_names = ", ".join(f"--{get_flag_name(flag)}" for flag in flags)
            lines.append(f"{text} ({flag_names})" if flags else text)
        return lines

    @property
    def all_settings(self) -> dict[str, Any]:
        return self.settings | dict(self.user_settings)

    @cached_property
    def base(self) -> Base:
        """Return the base, which must be chosen by then. Raises UserError."""
        return Base.of(self.all_settings)


def choose_recipe(choices: Choices, free_gib: float | None) -> int:
    """Choose the settings of the base's recipe, except those that the user set and those that are
    not a recipe's.

    choices: gets the settings and the notes
    free_gib: of the GPU; None without one

    Returns the exposures of each photo in the recipe.
    """
    base = choices.base
    name, recipe = load_recipe(base)

    # Its steps are for five photos; what is kept of them is how often each photo is shown.
    photos_a_step = recipe["train_batch_size"] * recipe.get("gradient_accumulation_steps", 1)
    exposures = recipe["max_train_steps"] * photos_a_step // RECIPE_PHOTOS

    # What of the recipe is another run's, or chosen by other settings.
    omitted = set(RUN_SETTINGS)
    # It gives way to what was given and cannot stand beside it.
    for setting, excluded in EXCLUSIONS.items():
        if choices.user_settings.get(setting):
            omitted.update(excluded)
        if any(choices.user_settings.get(excluded_setting) for excluded_setting in excluded):
            omitted.add(setting)
    if base.facts and not base.is_toy and base.is_flow:
        omitted.update(family_facts.UNET_SETTINGS)
    # The rate of an optimizer that a recipe names is that optimizer's alone.
    optimizer = recipe.get("optimizer", "").lower()
    if optimizer and str(choices.user_settings.get("optimizer", optimizer)).lower() != optimizer:
        omitted.add("learning_rate")
    layers = recipe.get("target_modules")
    if layers and choices.user_settings.get("use_dora"):  # which is of projections alone
        recipe["target_modules"] = [name for name in layers if "conv" not in name]
    if choices.user_settings.get("with_prior_preservation") is False:
        omitted.update(key for key in recipe if "prior" in key)
    recipe = {key: value for key, value in recipe.items() if key not in omitted}

    # A UNet may have been trained at another size than the models that its recipe is for.
    if base.facts and not base.is_toy and not base.is_flow:
        recipe["resolution"] = base.resolution_px

    # What the person is told of it.
    if not base.is_toy and free_gib is None and not devices.has_gpu():
        line = "samples: none, as each takes minutes on a CPU"
        choices.add(line, "num_validation_images", **NO_SAMPLE_SETTINGS)
        recipe = {key: value for key, value in recipe.items() if key not in NO_SAMPLE_SETTINGS}
    choices.add(f"recipe: assets/configs/{name}", "config", **recipe)
    if choices.settings.get("mixed_precision") == "no":
        lacks = "this CPU has no bf16"
        if devices.has_gpu():
            lacks = "this GPU has no bf16, and the model overflows in fp16"
        choices.add_note(f"precision: fp32, as {lacks}", "mixed_precision")
    return exposures


def choose_resolution(choices: Choices) -> None:
    """Choose the base's own resolution, unless the user set one; the default is SDXL's."""
    if "resolution" in choices.all_settings:
        return
    with suppress(UserError):  # of a base that cannot be used, which is refused later
        base_px = choices.base.resolution_px
        if base_px != TrainConfig.resolution:
            choices.add(
                f"resolution: {base_px} px, the base's own", "resolution", resolution=base_px
            )


def load_recipe(base: Base) -> tuple[str, dict[str, Any]]:
    """Return the name of the file in `assets/configs` for this base's family, and its settings.

    They include what the recipes leave open: the variant of bases without fp16 files, and the
    precision that the GPU, or the CPU where there is none, computes fast.
    """
    folder = get_assets_folder() / "configs"
    if base.is_toy:
        name = "toy_zimage.toml" if base.is_flow else "toy.toml"
        return name, config_files.load_settings(folder / name)
    facts = base.facts

    # The precision.
    precision = "no"
    if devices.has_gpu():
        precision = devices.choose_family_precision(facts)
    elif devices.has_fast_bf16():
        precision = "bf16"

    # The file: the family's, or SDXL's where the family is not known.
    name = f"{(facts or family_facts.SDXL).name}.toml"
    recipe = config_files.load_settings(folder / name)
    if base.name != family_facts.SDXL_HUB_ID:  # the only one that is known to have fp16 files
        recipe["variant"] = None
    return name, recipe | {"mixed_precision": precision}


def choose_family_settings(config: TrainConfig, base: Base) -> dict[str, Any]:
    """Return the settings of the base's family where the user set none; none for a UNet."""
    facts = base.facts
    if facts is None or facts.style == "ddpm":
        return {}
    settings: dict[str, Any] = {
        "target_modules": choose_target_modules(config, base),
        "lora_blocks": (),  # the layers above name them
        "weighting_scheme": config.weighting_scheme or facts.weighting_scheme,
    }
    settings |= choose_bucket_step(config, base)
    if config.precondition_outputs is None and facts.precondition_outputs:
        settings["precondition_outputs"] = True
    return settings


def choose_bucket_step(config: TrainConfig, base: Base) -> dict[str, int]:
    """Return the bucket step of a small base's family for crops in the photos' shapes, unless the
    user set one."""
    is_open = config.enable_bucket and not config.bucket_reso_steps
    is_small = config.resolution <= MAX_SMALL_BASE_PX
    if not (is_open and is_small and base.facts):
        return {}
    return {"bucket_reso_steps": base.facts.multiple_px}


def choose_target_modules(config: TrainConfig, base: Base) -> tuple[str, ...]:
    """Return the family's layers unless the user named others, in the blocks of `--lora_blocks`.

    The last block may lack some of the family's layers, which are left out where the base's files
    are here.
    """
    is_usual = config.target_modules == field_facts.ATTENTION_LAYERS
    names = base.facts.targets if is_usual else config.target_modules
    if not config.lora_blocks:
        return names

    # Each name in each block.
    block_names = []
    for block in config.lora_blocks:
        block_names += [f"transformer_blocks.{block}.{name}" for name in names]
    if not is_usual:
        return tuple(block_names)

    # Of the family's own names, those that the base has; without its files, all.
    paths = [path.removesuffix(".weight") for path in base.denoiser_shapes]
    present = [
        name for name in block_names if any(field_facts.is_target(path, name) for path in paths)
    ]
    return tuple(present or block_names)


def choose_prompts(choices: Choices, word: str) -> None:
    """Choose the prompts, and prior preservation by the frozen base unless the user refused it."""
    kind = SUBJECT_KINDS[choices.all_settings.get("subject", TrainConfig.subject)]
    if kind.is_style:
        choose_style(choices, word)
        return
    token = choices.user_settings.get("token") or DEFAULT_TOKEN
    prompt = f"a photo of a {token} {word}"
    class_prompt = f"a photo of a {kind.class_word or word}"
    if "instance_prompt" not in choices.user_settings:
        # the whole: a prompt's words from "with" on count as its context
        choices.add("", class_word=word)
    choices.add(f"words: “{prompt}”", "instance_prompt", "token", instance_prompt=prompt)
    if choices.user_settings.get("with_prior_preservation") is not False:
        used_class_prompt = choices.user_settings.get("class_prompt", class_prompt)
        choices.add(
            f"the class: “{used_class_prompt}” stays as the base draws it",
            "no_with_prior_preservation",
            "class_prompt",
            with_prior_preservation=True,
            class_prompt=class_prompt,
            prior="adapter_off",
        )


def choose_style(choices: Choices, name: str) -> None:
    """Choose the prompt of a style, which has no class to preserve, and the blocks that hold style
    in families where they are known."""
    prompt = f"a picture in {name} style"
    choices.add(f"words: “{prompt}”", "instance_prompt", instance_prompt=prompt, token=name)
    choices.add("", with_prior_preservation=False)
    if not choices.all_settings["with_prior_preservation"]:
        # What the recipe says of it would be remarked on as without effect.
        for name in [name for name in choices.settings if name.startswith("prior")]:
            del choices.settings[name]
    facts = choices.base.facts
    if facts and facts.style_layers and not choices.base.is_toy:
        line = "layers: the blocks that hold style"
        choices.add(line, "target_modules", target_modules=facts.style_layers)


def choose_steps(choices: Choices, exposures: int, photos: list["Photo"]) -> None:
    """Choose masks and crop shapes, and unless the user set the steps, as many as show each photo
    `exposures` times."""
    from dreambooth_moslora.photos.photo_file import count_photos

    is_given = choices.user_settings.keys() & {
        "max_train_steps",
        "num_train_epochs",
        "exposures_per_photo",
    }
    if not is_given:
        choices.settings["exposures_per_photo"] = exposures

    # The photos are named first, whatever was chosen before.
    counts = count_photos(photos)
    masked = sum(photo.mask_path is not None for photo in photos)
    photo_counts = " + ".join(map(str, counts))
    line = f"photos: {photo_counts}, {masked} with a mask (name.mask.png beside each)"
    choices.notes.insert(0, (line, ()))

    # Masks for those without one. A style is in the whole picture.
    kind = SUBJECT_KINDS[choices.all_settings.get("subject", TrainConfig.subject)]
    bare = 0 if kind.is_style else len(photos) - masked
    if bare and choices.base.is_toy:
        choices.add(f"masks: made for the {bare} without one", "masks", masks="auto")
    # SDXL's segmenter is a download, which needs the user's consent
    elif bare and "masks" not in choices.user_settings:
        choices.add_note("masks: off, as they need a download", "masks auto")

    # The crops, then the steps, which the other choices do not change any more.
    choose_shapes(choices, photos)
    if not is_given:
        line = f"steps: {count_steps(choices, photos)}, which show each photo {exposures} times"
        if len(set(counts)) > 1:
            line += ", and those of a subject with fewer oftener"
        choices.add_note(line, "exposures_per_photo", "max_train_steps")


def choose_shapes(choices: Choices, photos: Sequence["Photo"]) -> None:
    """Choose crops in the photos' own shapes unless all are nearly square, and near and far crops
    of a person.

    Square crops of 4:3 photos followed the prompts less on the sample subjects (`docs/studies.md`).
    """
    if SUBJECT_KINDS[choices.all_settings.get("subject", TrainConfig.subject)].has_face:
        line = f"crops: {FACE_CROPS_PER_PHOTO} of each photo, near the face and far"
        choices.add(line, "crops_per_photo", crops_per_photo=FACE_CROPS_PER_PHOTO)
    if any(max(photo.size_px) > MIN_OBLONG_RATIO * min(photo.size_px) for photo in photos):
        choices.add("crops: in the photos' own shapes", "no_enable_bucket", enable_bucket=True)


def count_steps(choices: Choices, photos: list["Photo"]) -> int:
    """Return the steps of the run by the settings chosen so far."""
    from dreambooth_moslora.photos.photo_file import count_photos

    config = TrainConfig.from_dict(choices.all_settings)
    return plan_steps(config, count_photos(photos), get_world_size()).total_steps


def choose_scores(
    choices: Choices, photos: list["Photo"], is_requested: bool | None = None
) -> None:
    """Choose scores, unless they need a download. The embedded base has its own encoders.

    is_requested: whether the user asked for scores or refused them; None for neither. An
    `evaluate_steps` of 0 refuses them.
    """
    from dreambooth_moslora.photos.photo_file import count_photos

    user_steps = choices.user_settings.get("evaluate_steps")
    is_open = is_requested is None and (user_steps or "evaluate_steps" not in choices.user_settings)
    missing = list_missing_encoders(choices.base.name, choices.all_settings.get("subject", "thing"))
    is_scored = not missing if is_open else is_requested

    # As often as a quarter of the run's time allows. A run of full length is scored at its end.
    config = TrainConfig.from_dict(choices.all_settings)
    step_plan = plan_steps(config, count_photos(photos), get_world_size())
    scorings = count_scorings(config, step_plan.total_steps)
    if not scorings and step_plan.exposures_per_photo < MIN_EXPOSURES and not is_requested:
        is_scored = is_scored and bool(user_steps)
    if is_scored:
        steps = user_steps or max(1, step_plan.total_steps // max(1, scorings))
        settings = {"evaluate_steps": steps, "validation_steps": steps}
        line = f"scores: every {steps} steps, the best in best/"
        choices.add(line, "evaluate_steps", **settings)
    elif is_open and not missing:
        images = count_sample_images(config, step_plan.total_steps)
        settings = {"num_validation_images": images, "validation_steps": step_plan.total_steps}
        line = "scores: none, as they would take most of so short a run"
        choices.add_note(line, "evaluate_steps")
        choices.add("", **settings)
    elif is_open and not user_steps:
        line = f"scores: none, as they take {' and '.join(missing)} from the hub"
        choices.add_note(line, "evaluate_steps")


def has_encoders(base: str) -> bool:
    """Return whether a run of a thing can be scored without a download."""
    return not list_missing_encoders(base, "thing")


def list_missing_encoders(base: str, kind: str) -> list[str]:
    """Return the names of encoders that scores need and that are not in the hub's cache. The
    embedded base has encoders; a kind of subject with a face needs SFace too."""
    from huggingface_hub import try_to_load_from_cache

    def is_cached(repo: str, file: str) -> bool:
        return isinstance(try_to_load_from_cache(repo, file), str)

    missing = []
    is_toy = toy_bases.is_toy(base)
    if not is_toy and not all(
        is_cached(name, "model.safetensors") for name in (CLIP_REPO, DINO_REPO)
    ):
        missing += ["CLIP", "DINOv2"]
    if SUBJECT_KINDS[kind].has_face and not is_cached(*SFACE):
        missing.append("SFace")
    return missing
