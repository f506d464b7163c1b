"""`train photos/dog dog`: a folder and a word, and all other settings chosen for them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreambooth_moslora.base import devices
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.cli.parser import unknown_flag_message
from dreambooth_moslora.cli.terminal import say_loading
from dreambooth_moslora.disk.paths import SUBJECT_FILE, find_asset, free_name
from dreambooth_moslora.disk.run_folder import RunDir, is_checkpoint
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.plan import agreement, defaults
from dreambooth_moslora.settings import family_facts, train_config

# Where runs go that have no --output_dir
RUNS = Path("runs")
# What a person is told where photographs are trained on the embedded base
NO_GPU = "No GPU here: the practice model (a 128 px toy) is trained, and it can draw toys alone."
ON_A_GPU = "On a machine with a GPU this trains SDXL."
# The end of messages about PHOTOS WORD
AS_ONE_WORD = "as in `train photos/dog dog`"


def choose(words: Sequence[str], given: dict[str, Any], *, has_recipe: bool) -> defaults.Choices:
    """All settings of a run.

    words: the folder of photos and the class
    given: settings, which win
    has_recipe: whether a file has taken the recipe's place

    Raises UserError.
    """
    from dreambooth_moslora.photos.folder import photo_report
    from dreambooth_moslora.plan.validation import check_distilled

    # The words, and a wrong base before PyTorch is imported to ask for the GPU's memory
    folder, word = folder_and_word(words)
    settings = {name: train_config.checked_setting(name, value) for name, value in given.items()}
    if settings.get("instance_data_dir"):
        raise UserError(f"{words[0]} and --instance_data_dir: give the folder of photos once.")
    base = settings.get("pretrained_model_name_or_path")
    if base:
        check_distilled(Base.find(base), settings.get("companion"))

    # The base. For photos of one's own the GPU is asked, which needs PyTorch.
    if not (folder / SUBJECT_FILE).is_file():
        say_loading()
    chosen = defaults.Choices(settings, {"instance_data_dir": str(folder)})
    if choose_base(chosen, folder):
        chosen.last_words = ["", NO_GPU, ON_A_GPU, ""]

    # The recipe that fits the GPU's memory
    free_gib = None if chosen.base.is_toy else agreement.least_free_gib()
    exposures = defaults.USUAL_EXPOSURES
    if not has_recipe:
        exposures = defaults.choose_recipe(chosen, free_gib)

    # Prompts and the run's folder
    defaults.choose_words(chosen, word)
    resumed_from = settings.get("resume_from_checkpoint")
    output = run_folder(word, resumed_from)
    goes_on = ", which goes on" if resumed_from and output.exists() else ""
    chosen.add(f"output: {output}{goes_on}", "output_dir", output_dir=str(output))

    # The photos are judged by the resolution; a recipe has it, a file may lack it.
    defaults.choose_resolution(chosen)
    chosen.photo_report = photo_report(train_config.TrainConfig.from_dict(chosen.all))

    # Steps and scores depend on how many photos there are.
    defaults.choose_steps(chosen, exposures, chosen.photo_report.photos)
    defaults.choose_scores(chosen, chosen.photo_report.photos)
    return chosen


def choose_base(chosen: defaults.Choices, folder: Path) -> bool:
    """Choose the base unless it is given. Returns whether for lack of a GPU it is the embedded
    one."""
    is_given = "pretrained_model_name_or_path" in chosen.given
    base = said = family_facts.STOCK_SDXL
    is_for_lack = False

    # Photos of toys
    if (folder / SUBJECT_FILE).is_file():
        base = "toy"
        said = "the embedded one, as the photos are of its world"

    # No GPU. If PyTorch only cannot use the one that is there, that is put right first.
    elif agreement.least_free_gib() is None:
        line = "" if is_given else devices.unused_gpu()
        if line:
            without = "without it only the embedded base is trained, which knows toys alone"
            raise UserError(f"{line.rstrip('.')}; {without}: --base toy")
        base = "toy"
        said = "the embedded one, as there is no GPU here, and the embedded base knows toys alone"
        is_for_lack = not is_given
    chosen.add(f"base: {said}", "pretrained_model_name_or_path", pretrained_model_name_or_path=base)
    return is_for_lack


def folder_and_word(words: Sequence[str]) -> tuple[Path, str]:
    """The folder of photos and the class. Raises UserError."""
    from dreambooth_moslora.photos.folder import require_folder_of_photos

    folder = Path(find_asset(words[0]))
    require_folder_of_photos(folder)
    word = " ".join(words[1:2]).strip()

    # One word for the class, or several in quotes
    if word.startswith("-"):
        raise UserError(unknown_flag_message(word))
    if not word or "/" in word:
        raise UserError(f"{words[0]}: say in one word what it shows, {AS_ONE_WORD}.")
    if len(words) > 2:
        said = f"`{words[2]}` belongs to no flag: a class of several words goes in quotes"
        raise UserError(f'{said}, as in `train {words[0]} "{" ".join(words[1:])}"`.')
    return folder, word


def run_folder(word: str, resumed_from: str | None = None) -> Path:
    """`runs/dog`, or a free name like it; for a resumed run the folder of the named checkpoint,
    else of the newest one; for several processes the first."""
    # A named checkpoint lies in its run.
    if resumed_from not in (None, "latest") and is_checkpoint(Path(resumed_from)):
        return Path(resumed_from).parent

    # A new run. Processes that start together cannot agree on a free name.
    name = re.sub(r"[^\w-]+", "_", word)[:60].strip("_") or "run"
    if not agreement.is_alone():
        return RUNS / name
    if not resumed_from:
        return RUNS / free_name(name, lambda taken: is_kept(RunDir(RUNS / taken)))

    # `latest`: of dog, dog_2, … dog_10 the one whose checkpoint is the newest
    own = re.compile(rf"{re.escape(name)}(_\d+)?")
    there = [RunDir(path) for path in RUNS.glob("*") if own.fullmatch(path.name)]
    saved = list(filter(None, map(RunDir.latest_checkpoint, there)))
    newest = max(saved, key=lambda path: path.stat().st_mtime, default=RUNS / name / "last")
    return newest.parent


def is_kept(run: RunDir) -> bool:
    """Whether a new run leaves the folder alone: it is there, and no run that ended in it without
    saving anything."""
    if not run.path.exists():
        return False
    is_empty = not (run.adapter_path.exists() or run.named_checkpoints())
    return not (is_empty and run.ending() in ("interrupted", "failed"))
