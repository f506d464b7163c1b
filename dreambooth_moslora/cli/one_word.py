"""`train photos/dog dog`: from a folder and a word, every other setting is chosen and said, one line a choice.

    words, what was given --choose--> settings + lines      what was given always wins

The base decides the recipe of `assets/configs`; on a GPU, its free memory decides which of SDXL's. A --config file
takes the recipe's place.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_moslora.core.assets import assets_folder, find_asset
from dreambooth_moslora.core.config import TrainConfig
from dreambooth_moslora.core.config_files import load_settings
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.names import free_name
from dreambooth_moslora.core.toy import is_toy

if TYPE_CHECKING:
    from dreambooth_moslora.photos.photo import Photo

__all__ = ["Choices", "choose", "leading_words"]

TOKEN = "sks"
PHOTOS_OF_A_RECIPE = 5
"""A recipe's steps are for so many photos: they say how often each is shown."""
USUAL_EXPOSURES = 200
"""Of a photo, where a file in the recipe's place names no steps."""
OWN = (
    *("pretrained_model_name_or_path", "instance_data_dir", "output_dir", "instance_prompt", "class_prompt"),
    "max_train_steps",
)
"""What a recipe names that is another run's, or is chosen here."""
RUNS = Path("runs")
EXAMPLE = "as in `train photos/dog dog`"
NO_GPU = "there is no GPU here, and the embedded base knows toys alone"


@dataclass
class Choices:
    """Settings that nobody gave, and a line for each choice with the flag that changes it."""

    given: Mapping[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def add(self, line: str, *flags: str, **settings: Any) -> None:
        """Nothing is said when all of it was given, nor without a `line`."""
        chosen = {name: value for name, value in settings.items() if name not in self.given}
        self.settings |= chosen
        if chosen and line:
            self.lines.append(f"{line} ({', '.join(f'--{flag}' for flag in flags)})")

    @property
    def all(self) -> dict[str, Any]:
        return self.settings | dict(self.given)


def leading_words(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words before the first flag, and the rest."""
    count = next((number for number, word in enumerate(argv) if word.startswith("-")), len(argv))
    return argv[:count], argv[count:]


def choose(words: list[str], given: Mapping[str, Any], *, has_recipe: bool = False) -> Choices:
    """All settings for the photos and the class in `words`. `given`: settings by flag or file, which win.

    `has_recipe`: the file among them takes the recipe's place.

    Raises UserError for a missing folder or word, and for a folder without photos.
    """
    folder, word = folder_and_word(words)
    if given.get("instance_data_dir"):
        raise UserError(f"{words[0]} and --instance_data_dir: give the folder of photos once.")
    choices = Choices(given, {"instance_data_dir": str(folder)})
    choose_base(choices, folder)
    exposures = USUAL_EXPOSURES if has_recipe else choose_recipe(choices)
    choose_words(choices, word)
    choose_output(choices, word)
    choose_steps(choices, exposures)
    choose_scores(choices)
    return choices


def folder_and_word(words: list[str]) -> tuple[Path, str]:
    folder, word = Path(find_asset(words[0])), " ".join(words[1:2]).strip()
    if not folder.is_dir():
        kind = "it is a file" if folder.exists() else "there is no such folder"
        raise UserError(f"{words[0]}: {kind}; give the folder of photos first, then the word, {EXAMPLE}.")
    if not word or "/" in word:
        raise UserError(f"{words[0]}: say in one word what it shows, {EXAMPLE}.")
    if len(words) > 2:
        raise UserError(f"`{words[2]}` belongs to no flag: a class of several words goes in quotes, {EXAMPLE}.")
    return folder, word


def choose_base(choices: Choices, folder: Path) -> None:
    from dreambooth_moslora.training.planning.estimate import STOCK_SDXL

    is_of_toys = (folder / "subject.json").is_file()
    base = "toy" if is_of_toys or gpu_gib() is None else STOCK_SDXL
    why = "the photos are of its world" if is_of_toys else NO_GPU
    said = f"the embedded one, as {why}" if base == "toy" else base
    choices.add(f"base: {said}", "pretrained_model_name_or_path", pretrained_model_name_or_path=base)


def gpu_gib() -> float | None:
    """Free memory of the GPU that a run would use; None without one."""
    from dreambooth_moslora.training.planning.estimate import free_gib_of_gpu

    return free_gib_of_gpu()


def choose_recipe(choices: Choices) -> int:
    """Returns how often its steps show each photo."""
    base = choices.all["pretrained_model_name_or_path"]
    free = None if is_toy(base) else gpu_gib()
    name = "toy.toml" if is_toy(base) else f"sdxl_{recipe_gb(free)}gb.toml"
    recipe = load_settings(assets_folder() / "configs" / name)
    photos_a_step = recipe["train_batch_size"] * recipe.get("gradient_accumulation_steps", 1)
    exposures = recipe["max_train_steps"] * photos_a_step // PHOTOS_OF_A_RECIPE
    recipe = {key: value for key, value in recipe.items() if key not in OWN}
    if not is_toy(base):
        recipe |= for_base_and_card(base, name)
    if choices.given.get("do_edm_style_training"):
        recipe.pop("snr_gamma", None)
    if choices.given.get("with_prior_preservation") is False:
        recipe = {key: value for key, value in recipe.items() if "prior" not in key}
    memory = "" if free is None else f" for {free:.0f} GiB of free GPU memory"
    choices.add(f"recipe: assets/configs/{name}{memory}", "config", **recipe)
    return exposures


def recipe_gb(free: float | None) -> int:
    """A recipe takes at most nine tenths of its card. Without a GPU, the one that is usual."""
    from dreambooth_moslora.training.planning.estimate import RECIPES

    return 12 if free is None else max((gb for gb in RECIPES if 0.9 * gb <= free), default=min(RECIPES))


def for_base_and_card(base: str, recipe: str) -> dict[str, Any]:
    """What SDXL's recipes leave to the person: a base without fp16 files, an old GPU, and the class kept too."""
    import torch

    from dreambooth_moslora.training.planning.estimate import STOCK_SDXL

    changes: dict[str, Any] = {}
    if base != STOCK_SDXL:
        changes["variant"] = None
    if recipe == "sdxl_16gb.toml":
        changes["gradient_checkpointing"] = True
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        changes["mixed_precision"] = "fp16"
    return changes


def choose_words(choices: Choices, word: str) -> None:
    token = choices.given.get("token") or TOKEN
    prompt, of_class = f"a photo of a {token} {word}", f"a photo of a {word}"
    choices.add(f"words: “{prompt}”", "instance_prompt", "token", instance_prompt=prompt)
    if choices.given.get("with_prior_preservation") is not False:
        line = f"the class: “{of_class}” stays as the base draws it"
        choices.add(line, "no_with_prior_preservation", with_prior_preservation=True)
        choices.add("", class_prompt=of_class, prior="adapter_off")


def choose_output(choices: Choices, word: str) -> None:
    folder = run_folder(word, resumes=bool(choices.given.get("resume_from_checkpoint")))
    choices.add(f"output: {folder}", "output_dir", output_dir=str(folder))


def run_folder(word: str, resumes: bool) -> Path:
    """`runs/dog`, or a free name like it; for a run that goes on, the latest of those names.

    Several processes cannot each look for a free name: they share the first, and an earlier run makes room.
    """
    name = re.sub(r"[^\w-]+", "_", word)[:60].strip("_") or "run"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return RUNS / name
    if not resumes:
        return RUNS / free_name(name, lambda taken: (RUNS / taken).exists())
    there = [path for path in RUNS.glob("*") if re.fullmatch(rf"{re.escape(name)}(_\d+)?", path.name)]
    return max(there, key=lambda path: (len(path.name), path.name), default=RUNS / name)


def choose_steps(choices: Choices, exposures: int) -> None:
    """So many that each photo is shown `exposures` times, unless the steps were given."""
    is_given = choices.given.keys() & {"max_train_steps", "num_train_epochs", "exposures_per_photo"}
    if not is_given:
        choices.settings["exposures_per_photo"] = exposures
    photos, steps = photos_and_steps(choices)
    choose_masks(choices, photos)
    if not is_given:
        line = f"steps: {steps}, which show each photo {exposures} times"
        choices.lines.append(f"{line} (--exposures_per_photo, --max_train_steps)")


def choose_masks(choices: Choices, photos: list["Photo"]) -> None:
    """The embedded base has a segmenter of its own; SDXL's is a download, which nobody asked for."""
    masked = sum(photo.mask_path is not None for photo in photos)
    choices.lines.insert(0, f"photos: {len(photos)}, {masked} with a mask (name.mask.png beside each)")
    bare = len(photos) - masked
    if bare and is_toy(choices.all["pretrained_model_name_or_path"]):
        choices.add(f"masks: made for the {bare} without one", "masks", masks="auto")
    elif bare and "masks" not in choices.given:
        choices.lines.append("masks: made for none, as CLIPSeg comes from the hub (--masks auto)")


def photos_and_steps(choices: Choices) -> tuple[list["Photo"], int]:
    from dreambooth_moslora.photos.folder import photo_report
    from dreambooth_moslora.training.planning.step_plan import plan_steps

    config = TrainConfig.from_dict(choices.all | {"early_stopping": None})  # the scores it needs are chosen later
    photos = photo_report(config).photos
    return photos, plan_steps(config, len(photos), int(os.environ.get("WORLD_SIZE", "1"))).total_steps


def choose_scores(choices: Choices) -> None:
    """The embedded base has its own encoders; SDXL's are a download, which nobody asked for."""
    if is_toy(choices.all["pretrained_model_name_or_path"]):
        every = max(1, photos_and_steps(choices)[1] // 4)
        line = f"scores: every {every} steps, the best in best/, and the best scale at the end"
        choices.add(line, "evaluate_steps", "no_find_scale", evaluate_steps=every, find_scale=True)
    elif not choices.given.get("evaluate_steps"):
        choices.lines.append("scores: none, as they take CLIP and DINOv2 from the hub (--evaluate_steps, --find_scale)")
