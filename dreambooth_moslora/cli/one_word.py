"""`train photos/dog dog`: chooses every other setting for a folder and a word, with one line about each choice.

`training.planning.choices` chooses by the base, the GPU and the photos. This module adds what a terminal needs:
the folder and the word, the base, and the run folder. A --config file replaces the recipe.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_moslora.core.assets import find_asset
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.names import SUBJECT_FILE, free_name
from dreambooth_moslora.core.toy import is_toy
from dreambooth_moslora.training.planning.choices import (
    USUAL_EXPOSURES,
    Choices,
    choose_recipe,
    choose_scores,
    choose_steps,
    choose_words,
)

if TYPE_CHECKING:
    from dreambooth_moslora.photos.photo import Photo

__all__ = ["choose", "leading_words"]

RUNS = Path("runs")
EXAMPLE = "as in `train photos/dog dog`"
NO_GPU = "there is no GPU here, and the embedded base knows toys alone"


def leading_words(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words before the first flag, and the rest."""
    count = next((number for number, word in enumerate(argv) if word.startswith("-")), len(argv))
    return argv[:count], argv[count:]


def choose(words: list[str], given: Mapping[str, Any], *, has_recipe: bool = False, is_queued: bool = False) -> Choices:
    """All settings for the photos and the class in `words`. Settings `given` by flag or file override the choices.

    `has_recipe`: a given file replaces the recipe. `is_queued`: the run will have the whole GPU. Raises
    UserError for a missing folder or word, and for a folder without photos.
    """
    folder, word = folder_and_word(words)
    if given.get("instance_data_dir"):
        raise UserError(f"{words[0]} and --instance_data_dir: give the folder of photos once.")
    choices = Choices(given, {"instance_data_dir": str(folder)})
    choose_base(choices, folder)
    free_gib = None if is_toy(choices.all["pretrained_model_name_or_path"]) else gpu_gib(is_later=is_queued)
    exposures = USUAL_EXPOSURES if has_recipe else choose_recipe(choices, free_gib)
    choose_words(choices, word)
    choose_output(choices, word)
    photos = photos_of(choices)
    choose_steps(choices, exposures, photos)
    choose_scores(choices, photos)
    return choices


def folder_and_word(words: list[str]) -> tuple[Path, str]:
    """The folder of photos and the class. Raises UserError."""
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

    is_of_toys = (folder / SUBJECT_FILE).is_file()
    base = "toy" if is_of_toys or gpu_gib() is None else STOCK_SDXL
    why = "the photos are of its world" if is_of_toys else NO_GPU
    said = f"the embedded one, as {why}" if base == "toy" else base
    choices.add(f"base: {said}", "pretrained_model_name_or_path", pretrained_model_name_or_path=base)


def gpu_gib(*, is_later: bool = False) -> float | None:
    """Free memory of the GPU for this run, of several the least, now or when other runs have ended; None without a
    GPU."""
    from dreambooth_moslora.training.planning.common_settings import least_free_gib

    return least_free_gib(is_later=is_later)


def choose_output(choices: Choices, word: str) -> None:
    folder = run_folder(word, resumes=bool(choices.given.get("resume_from_checkpoint")))
    choices.add(f"output: {folder}", "output_dir", output_dir=str(folder))


def run_folder(word: str, resumes: bool) -> Path:
    """`runs/dog`, or a free name like it; for a resumed run, the latest of these names.

    Several processes cannot each find a free name: they use the first one, and an earlier run there is moved
    away.
    """
    name = re.sub(r"[^\w-]+", "_", word)[:60].strip("_") or "run"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return RUNS / name
    if not resumes:
        return RUNS / free_name(name, lambda taken: (RUNS / taken).exists())
    there = [path for path in RUNS.glob("*") if re.fullmatch(rf"{re.escape(name)}(_\d+)?", path.name)]
    return max(there, key=lambda path: (len(path.name), path.name), default=RUNS / name)


def photos_of(choices: Choices) -> list["Photo"]:
    from dreambooth_moslora.photos.folder import photo_report

    return photo_report(TrainConfig.from_dict(choices.all | {"early_stopping": None})).photos
