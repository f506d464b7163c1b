"""`train photos/dog dog`: a folder and a word, and all other settings chosen for them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreambooth_moslora.base import devices
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.cli.parser import describe_unknown_flag
from dreambooth_moslora.cli.terminal import print_loading
from dreambooth_moslora.disk.paths import SUBJECT_FILE, find_asset, find_free_name
from dreambooth_moslora.disk.run_folder import RunDir, is_checkpoint
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.plan import agreement, defaults
from dreambooth_moslora.settings import family_facts, train_config

# Where runs go that have no --output_dir
RUNS_FOLDER = Path("runs")
# What a person is told where photographs are trained on the embedded base
NO_GPU_NOTE = (
    "No GPU here: the practice model (a 128 px toy) is trained, and it can draw toys alone."
)
GPU_HINT = "On a machine with a GPU this trains SDXL."
# The end of messages about PHOTOS WORD
USAGE_EXAMPLE = "as in `train photos/dog dog`"


def choose_settings(
    positionals: Sequence[str], overrides: dict[str, Any], *, has_recipe: bool
) -> defaults.Choices:
    """All settings of a run.

    positionals: the folder of photos and the class
    overrides: settings, which win
    has_recipe: whether a file has taken the recipe's place

    Raises UserError.
    """
    from dreambooth_moslora.photos.folder import build_photo_report
    from dreambooth_moslora.plan.validation import check_distilled

    # The words, and a wrong base before PyTorch is imported to ask for the GPU's memory
    folder, word = parse_folder_and_word(positionals)
    settings = {name: train_config.parse_setting(name, value) for name, value in overrides.items()}
    if settings.get("instance_data_dir"):
        raise UserError(
            f"{positionals[0]} and --instance_data_dir: give the folder of photos once."
        )
    base = settings.get("pretrained_model_name_or_path")
    if base:
        check_distilled(Base.find(base), settings.get("companion"))

    # The base. For photos of one's own the GPU is asked, which needs PyTorch.
    if not (folder / SUBJECT_FILE).is_file():
        print_loading()
    chosen = defaults.Choices(settings, {"instance_data_dir": str(folder)})
    if choose_base(chosen, folder):
        chosen.closing_lines = ["", NO_GPU_NOTE, GPU_HINT, ""]

    # The recipe that fits the GPU's memory
    free_gib = None if chosen.base.is_toy else agreement.get_min_free_gib()
    exposures = defaults.DEFAULT_EXPOSURES
    if not has_recipe:
        exposures = defaults.choose_recipe(chosen, free_gib)

    # Prompts and the run's folder
    defaults.choose_prompts(chosen, word)
    resumed_from = settings.get("resume_from_checkpoint")
    output = choose_run_folder(word, resumed_from)
    goes_on = ", which goes on" if resumed_from and output.exists() else ""
    chosen.add(f"output: {output}{goes_on}", "output_dir", output_dir=str(output))

    # The photos are judged by the resolution; a recipe has it, a file may lack it.
    defaults.choose_resolution(chosen)
    chosen.photo_report = build_photo_report(
        train_config.TrainConfig.from_dict(chosen.all_settings)
    )

    # Steps and scores depend on how many photos there are.
    defaults.choose_steps(chosen, exposures, chosen.photo_report.photos)
    defaults.choose_scores(chosen, chosen.photo_report.photos)
    return chosen


def choose_base(run_settings: defaults.Choices, folder: Path) -> bool:
    """Choose the base unless it is given. Returns whether for lack of a GPU it is the embedded
    one."""
    is_given = "pretrained_model_name_or_path" in run_settings.user_settings
    base = said = family_facts.SDXL_HUB_ID
    is_for_lack = False

    # Photos of toys
    if (folder / SUBJECT_FILE).is_file():
        base = "toy"
        said = "the embedded one, as the photos are of its world"

    # No GPU. If PyTorch only cannot use the one that is there, that is put right first.
    elif agreement.get_min_free_gib() is None:
        line = "" if is_given else devices.explain_unused_gpu()
        if line:
            without = "without it only the embedded base is trained, which knows toys alone"
            raise UserError(f"{line.rstrip('.')}; {without}: --base toy")
        base = "toy"
        said = "the embedded one, as there is no GPU here, and the embedded base knows toys alone"
        is_for_lack = not is_given
    run_settings.add(
        f"base: {said}", "pretrained_model_name_or_path", pretrained_model_name_or_path=base
    )
    return is_for_lack


def parse_folder_and_word(positionals: Sequence[str]) -> tuple[Path, str]:
    """The folder of photos and the class. Raises UserError."""
    from dreambooth_moslora.photos.folder import require_photo_folder

    folder = Path(find_asset(positionals[0]))
    require_photo_folder(folder)
    word = " ".join(positionals[1:2]).strip()

    # One word for the class, or several in quotes
    if word.startswith("-"):
        raise UserError(describe_unknown_flag(word))
    if not word or "/" in word:
        raise UserError(f"{positionals[0]}: say in one word what it shows, {USAGE_EXAMPLE}.")
    if len(positionals) > 2:
        said = f"`{positionals[2]}` belongs to no flag: a class of several words goes in quotes"
        raise UserError(f'{said}, as in `train {positionals[0]} "{" ".join(positionals[1:])}"`.')
    return folder, word


def choose_run_folder(word: str, resumed_from: str | None = None) -> Path:
    """`runs/dog`, or a free name like it; for a resumed run the folder of the named checkpoint,
    else of the newest one; for several processes the first."""
    # A named checkpoint lies in its run.
    if resumed_from not in (None, "latest") and is_checkpoint(Path(resumed_from)):
        return Path(resumed_from).parent

    # A new run. Processes that start together cannot agree on a free name.
    name = re.sub(r"[^\w-]+", "_", word)[:60].strip("_") or "run"
    if not agreement.is_single_process():
        return RUNS_FOLDER / name
    if not resumed_from:
        return RUNS_FOLDER / find_free_name(
            name, lambda taken: has_results(RunDir(RUNS_FOLDER / taken))
        )

    # `latest`: of dog, dog_2, … dog_10 the one whose checkpoint is the newest
    own = re.compile(rf"{re.escape(name)}(_\d+)?")
    there = [RunDir(path) for path in RUNS_FOLDER.glob("*") if own.fullmatch(path.name)]
    saved = list(filter(None, map(RunDir.find_latest_checkpoint, there)))
    newest = max(saved, key=lambda path: path.stat().st_mtime, default=RUNS_FOLDER / name / "last")
    return newest.parent


def has_results(run: RunDir) -> bool:
    """Whether a new run leaves the folder alone: it is there, and no run that ended in it without
    saving anything."""
    if not run.path.exists():
        return False
    is_empty = not (run.adapter_path.exists() or run.list_checkpoint_folders())
    return not (is_empty and run.read_ending() in ("interrupted", "failed"))
