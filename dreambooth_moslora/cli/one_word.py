"""`train photos/dog dog`: all settings chosen for a folder and a word."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreambooth_moslora.base import devices
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.cli.parser import describe_unknown_flag
from dreambooth_moslora.cli.terminal import print_loading
from dreambooth_moslora.disk.paths import SUBJECT_FILE, find_asset, find_free_name
from dreambooth_moslora.disk.run_folder import RunDir, is_checkpoint
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.importers.datasets import list_repeats_folders
from dreambooth_moslora.plan import agreement, defaults
from dreambooth_moslora.settings import family_facts, train_config
from dreambooth_moslora.settings.subject_kinds import SUBJECT_KINDS

RUNS_FOLDER = Path("runs")
"""Folder of the runs that have no --output_dir."""
NO_GPU_NOTES = (
    "No GPU found. Using a practice model that cannot learn real photos.",
    "Choose another with --base. With a GPU this trains SDXL.",
)
"""Lines for photos of real things that are trained on the embedded base."""
USAGE_EXAMPLE = "as in `train photos/dog dog`"
"""End of messages about PHOTOS WORD."""


def choose_settings(
    positionals: Sequence[str], settings: Mapping[str, Any], *, has_recipe: bool
) -> defaults.Choices:
    """Choose all settings of a run.

    positionals: the folder of photos and the class
    settings: of the user, as `parse_settings` returns them, which are never replaced
    has_recipe: whether a --config file replaces the recipe

    Raises UserError.
    """
    from dreambooth_moslora.photos import faces
    from dreambooth_moslora.photos.folder import build_photo_report
    from dreambooth_moslora.plan.validation import check_distilled

    # Check the arguments and the base before PyTorch is imported to measure the GPU's memory.
    folder, word = parse_folder_and_word(positionals)
    if settings.get("instance_data_dir"):
        raise UserError(
            f"{positionals[0]} and --instance_data_dir: give the folder of photos once."
        )
    base = settings.get("pretrained_model_name_or_path")
    if base:
        check_distilled(Base.find(base), settings.get("companion"))
    if SUBJECT_KINDS[settings.get("subject") or "thing"].has_face:
        faces.load_face_reader()  # needs OpenCV

    # Choose the base: for photos of real things by the GPU, which needs PyTorch.
    if not (folder / SUBJECT_FILE).is_file():
        print_loading()
    choices = defaults.Choices(settings, {"instance_data_dir": str(folder)})
    if choose_base(choices, folder):
        choices.closing_lines = ["", *NO_GPU_NOTES, ""]

    # Choose the recipe that fits the GPU's memory.
    free_gib = None if choices.base.is_toy else agreement.get_min_free_gib()
    exposures = defaults.DEFAULT_EXPOSURES
    if not has_recipe:
        exposures = defaults.choose_recipe(choices, free_gib)

    # Choose prompts and the run's folder.
    defaults.choose_prompts(choices, word)
    resumed_from = settings.get("resume_from_checkpoint")
    output = choose_run_folder(word, resumed_from)
    note = ", which is resumed" if resumed_from and output.exists() else ""
    choices.add(f"output: {output}{note}", "output_dir", output_dir=str(output))

    # Photos are judged by the resolution; a recipe has it, a file may lack it.
    defaults.choose_resolution(choices)
    choices.photo_report = build_photo_report(
        train_config.TrainConfig.from_dict(choices.all_settings)
    )

    # Steps and scores depend on the number of photos.
    defaults.choose_steps(choices, exposures, choices.photo_report.photos)
    defaults.choose_scores(choices, choices.photo_report.photos)
    return choices


def choose_base(choices: defaults.Choices, folder: Path) -> bool:
    """Choose the base unless the user has. Return whether the embedded one was chosen for lack of a
    GPU."""
    is_set_by_user = "pretrained_model_name_or_path" in choices.user_settings
    base = description = family_facts.SDXL_HUB_ID
    has_no_gpu = False

    # Photos of toys
    if (folder / SUBJECT_FILE).is_file():
        base = "toy"
        description = "the embedded one, as the photos are of its world"

    # No GPU. One that PyTorch cannot use must be set up first.
    elif agreement.get_min_free_gib() is None:
        problem = "" if is_set_by_user else devices.explain_unused_gpu()
        if problem:
            raise UserError(
                f"{problem.rstrip('.')}; without it only the embedded base is trained, which "
                "knows toys alone: --base toy"
            )
        base = "toy"
        description = "the embedded one, as there is no GPU here, and it knows toys alone"
        has_no_gpu = not is_set_by_user
    choices.add(
        f"base: {description}", "pretrained_model_name_or_path", pretrained_model_name_or_path=base
    )
    return has_no_gpu


def parse_folder_and_word(positionals: Sequence[str]) -> tuple[Path, str]:
    """Return the folder of photos and the class. Raises UserError."""
    from dreambooth_moslora.photos.folder import require_photo_folder

    folder = Path(find_asset(positionals[0]))
    require_photo_folder(folder)

    # The photos of sd-scripts lie in a folder such as `10_sks dog` in it.
    inner_folders = list_repeats_folders(folder)
    if len(inner_folders) == 1:
        folder = inner_folders[0][0]
    word = " ".join(positionals[1:2]).strip()

    # The class is one argument: one word, or several in quotes.
    if word.startswith("-"):
        raise UserError(describe_unknown_flag(word))
    if not word or "/" in word:
        raise UserError(f"{positionals[0]}: say in one word what it shows, {USAGE_EXAMPLE}.")
    if len(positionals) > 2:
        raise UserError(
            f"`{positionals[2]}` belongs to no flag: a class of several words goes in quotes, "
            f'as in `train {positionals[0]} "{" ".join(positionals[1:])}"`.'
        )
    return folder, word


def choose_run_folder(word: str, resumed_from: str | None = None) -> Path:
    """Return `runs/dog`, or a free name like it; for a resumed run the folder of its checkpoint, by
    default of the newest one; for several processes always `runs/dog`."""
    # A checkpoint path lies in its run's folder.
    if resumed_from not in (None, "latest") and is_checkpoint(Path(resumed_from)):
        return Path(resumed_from).parent

    # A new run. Processes that start together cannot agree on a free name.
    name = re.sub(r"[^\w-]+", "_", word)[:60].strip("_") or "run"
    if not agreement.is_single_process():
        return RUNS_FOLDER / name
    if not resumed_from:
        return RUNS_FOLDER / find_free_name(
            name, lambda candidate: has_results(RunDir(RUNS_FOLDER / candidate))
        )

    # `latest`: of dog, dog_2, … dog_10 the run with the newest checkpoint
    pattern = re.compile(rf"{re.escape(name)}(_\d+)?")
    runs = [RunDir(path) for path in RUNS_FOLDER.glob("*") if pattern.fullmatch(path.name)]
    checkpoints = filter(None, map(RunDir.find_latest_checkpoint, runs))
    newest = max(
        checkpoints, key=lambda path: path.stat().st_mtime, default=RUNS_FOLDER / name / "last"
    )
    return newest.parent


def has_results(run: RunDir) -> bool:
    """Return whether a new run must not use the folder: it exists, unless its run ended without
    saving anything."""
    if not run.path.exists():
        return False
    has_weights = run.adapter_path.exists() or bool(run.list_checkpoint_folders())
    return has_weights or run.read_ending() not in ("interrupted", "failed")
