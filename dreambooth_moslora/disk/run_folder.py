"""Run folder: the names of its files, its complete checkpoints, and the adapters in it.

Adapter files lie in folders of adapters and in runs. A user selects one by the name that
`format_adapter_name` returns.
"""

import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from dreambooth_moslora.disk.atomic import remove_directory, restore_directories
from dreambooth_moslora.disk.contents import read_json, read_stored_text
from dreambooth_moslora.disk.events import (
    RunEnded,
    StepEvaluated,
    append_event,
    filter_events,
    read_events,
)
from dreambooth_moslora.disk.paths import expand_user_path, find_free_name
from dreambooth_moslora.errors import UserError

PUBLISHED_NAME = "pytorch_lora_weights.safetensors"
"""The published LoRA, as diffusers names it."""
RAW_NAME = "moslora_weights.safetensors"
"""A, B and M as they are trained."""
KOHYA_SUFFIX = ".kohya.safetensors"
"""End of the name of the file for other programs, after the run's name."""
SETTINGS_NAME = "train_config.json"
BEST_NAME = "best"
"""Folder of a run's best evaluated step."""
METRICS_NAME = "metrics.jsonl"
LOG_NAME = "train.log"
SCORES_NAME = "scores.json"
"""Result in a folder of `evaluate`."""
POSITION_NAME = "position.json"
OPTIMIZER_NAME = "optimizer.pt"
CHECKPOINT_FILES = (POSITION_NAME, OPTIMIZER_NAME, RAW_NAME)
"""Files of a complete checkpoint."""
MAX_NAME_BYTES = 200
"""Longest name of a run: systems allow 255 bytes, and suffixes add to it."""
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


class RunDir:
    """Paths in the output folder `path` of one run. Nothing is created until something is
    written."""

    def __init__(self, path: str | Path):
        self.path = path = Path(path)
        self.adapter_path = path / PUBLISHED_NAME
        self.card_path = path / "README.md"
        self.config_path = path / SETTINGS_NAME
        self.metrics_path = path / METRICS_NAME
        self.log_path = path / LOG_NAME
        self.samples_dir = path / "samples"
        self.photos_dir = path / "photos"  # copies of uploaded photos
        self.class_images_dir = path / "class_images"
        self.masks_dir = path / "masks"  # made by --masks auto
        self.captions_path = path / "captions.json"  # made by --captions auto
        self.best_dir = path / BEST_NAME
        self.evaluation_dir = path / "evaluation"  # written by `evaluate`
        # checkpoint at the end, if its step is no multiple of --checkpointing_steps
        self.last_dir = path / "last"
        self.contact_sheet_path = path / "contact_sheet.png"
        self.loss_plot_path = path / "loss.png"

    @property
    def name(self) -> str:
        return self.path.resolve().name or "adapter"

    @property
    def kohya_path(self) -> Path:
        return self.path / f"{self.name}{KOHYA_SUFFIX}"

    def read_card(self) -> str | None:
        """Return the text of the model card; None without one. Raises UserError."""
        return read_stored_text(self.card_path) if self.card_path.is_file() else None

    def get_checkpoint_path(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def list_checkpoints(self) -> list[Path]:
        """Return the complete checkpoints by step, including `last`."""
        return [path for path in self.list_checkpoint_folders() if is_checkpoint(path)]

    def list_checkpoint_folders(self) -> list[Path]:
        """Return all folders with a checkpoint's name, by step: complete, damaged, or not a
        run's."""
        if not self.path.is_dir():
            return []
        restore_directories(self.path)
        folders = []
        for path in self.path.iterdir():
            if parse_checkpoint_step(path) is not None or path == self.last_dir:
                folders.append(path)
        return sorted(folders, key=read_checkpoint_step)

    def find_latest_checkpoint(self) -> Path | None:
        """Return the complete checkpoint of the most steps; None without one."""
        checkpoints = self.list_checkpoints()
        return checkpoints[-1] if checkpoints else None

    def rotate_checkpoints(self, limit: int | None) -> None:
        """Keep the newest `limit` numbered checkpoints; None keeps all."""
        if limit is None:
            return
        numbered = [path for path in self.list_checkpoints() if path != self.last_dir]
        for path in numbered[: -max(1, limit)]:
            remove_directory(path)

    def record_event(self, event: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        append_event(self.metrics_path, event)

    def read_events(self, kind: str = "") -> list[dict[str, Any]]:
        return read_events(self.metrics_path, kind) if self.metrics_path.is_file() else []

    def read_ending(self) -> str:
        """Return how the last run ended: `done`, `interrupted` or `failed`; "" if it has not."""
        last = self.read_events()[-1:]
        return last[0]["state"] if last and last[0]["type"] == RunEnded.kind else ""

    def read_scores(self) -> list[StepEvaluated]:
        return filter_events(StepEvaluated, self.read_events(StepEvaluated.kind))


def check_name(name: str) -> None:
    """Raise UserError for a name that no file can have, or that is too long with suffixes added."""
    if name in ("", ".", "..") or not name.isprintable() or Path(name).name != name:
        raise UserError(f"{name!a} cannot be part of a file's name; give the adapter a plain name")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise UserError(
            f"the name {name} is too long: an adapter's has at most {MAX_NAME_BYTES} bytes"
        )


def parse_checkpoint_step(path: PurePath) -> int | None:
    """Return the step in a checkpoint's name; None for another name."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def read_checkpoint_step(path: Path) -> int:
    """Return the step of a checkpoint; for `last` from its position file, or -1 if that is
    damaged."""
    step = parse_checkpoint_step(path)
    if step is not None:
        return step
    with suppress(UserError):
        return read_json(path / POSITION_NAME, Position).step
    return -1


@dataclass(frozen=True)
class Position:
    """Content of a checkpoint's position.json."""

    step: int  # optimizer steps done
    seed: int  # of all random numbers
    optimizer: str = ""  # `get_optimizer_name`
    # Digests of the base's parts (`identify_base`); a sentence in earlier versions.
    base: dict[str, str] | str = field(default_factory=dict)
    digest: str = ""  # of the position and the files beside it (`digest_checkpoint`)
    # To list the changes of a resumed run; {} in earlier versions.
    settings: dict[str, Any] = field(default_factory=dict)  # by name, as JSON
    photos: dict[str, str] = field(default_factory=dict)  # `hash_files`


def is_checkpoint(path: Path) -> bool:
    """Return whether all files of a checkpoint exist; their content is not checked."""
    files = [path / name for name in CHECKPOINT_FILES]
    return all(file.is_file() and file.stat().st_size for file in files)


CARD_SIGNATURE = "Made with dreambooth_moslora"
"""Sentence of each model card of this program."""
CARD_PICTURE = re.compile(r"\burl: (image_\d+\.png)")
"""Line of a card that names one of the run's images."""


def is_card(text: str) -> bool:
    return CARD_SIGNATURE in text


def list_card_pictures(text: str) -> set[str]:
    """Return the image files that a card of this program names; empty for any other text."""
    return set(CARD_PICTURE.findall(text)) if is_card(text) else set()


NO_ADAPTER = "none"
"""Selects no adapter; no file gets this name."""
PEFT_CONFIG_NAME = "adapter_config.json"
"""File that PEFT writes beside adapter_model.safetensors."""
UNSAFE_CHARACTERS = re.compile(r"[^\w .+-]+")
"""Characters that are replaced in the name of an adapter."""


def find_weights(path: str | Path) -> Path:
    """Return an adapter's file: the path itself, or a run's published or a checkpoint's raw one.

    Raises UserError, also for pickles.
    """
    path = expand_user_path(path)
    if path.is_dir():
        path = path / (PUBLISHED_NAME if (path / PUBLISHED_NAME).is_file() else RAW_NAME)
    if not path.is_file():
        # A run writes its adapter at the end.
        if path.name == RAW_NAME and RunDir(path.parent).metrics_path.is_file():
            raise UserError(
                f"{path.parent} has no adapter: its run did not come to its end; "
                f"`explain {path.parent}` says how to go on"
            )
        raise UserError(f"there is no adapter file {path}")
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path.name} is not a .safetensors file; other formats can carry code and are "
            "not opened"
        )
    return path


def map_adapter_names(
    files: Iterable[Path], folders: Collection[Path], reserved_names: Collection[str] = ()
) -> dict[str, Path]:
    """Return name -> file, in order, with a number behind a name that is taken.

    Links to files outside `folders` are left out.
    """
    files_by_name: dict[str, Path] = {}
    taken_names = {NO_ADAPTER, *reserved_names}
    for file in files:
        if not is_file_inside(file, folders):
            continue
        name = find_free_name(format_adapter_name(file, folders), taken_names.__contains__, " ")
        taken_names.add(name)
        files_by_name[name] = file
    return files_by_name


def list_run_adapters(runs: Collection[Path]) -> list[Path]:
    """Return the runs' adapters, newest first, each with that of its best step, then checkpoints.

    Checkpoints of one run come in descending order of steps.
    """
    # The best step's adapter lies beside the run's own, whose time counts.
    adapters = []
    for run_dir in sorted(map(RunDir, runs), key=get_publish_time, reverse=True):
        paths = (run_dir.adapter_path, run_dir.best_dir / PUBLISHED_NAME)
        adapters += [path for path in paths if path.is_file()]

    def get_sort_key(file: Path) -> tuple[str, int]:
        return file.parent.parent.name, -(parse_checkpoint_step(file.parent) or 0)

    checkpoints = [file for run in runs for file in run.glob(f"checkpoint-*/{RAW_NAME}")]
    return [*adapters, *sorted(checkpoints, key=get_sort_key)]


def get_publish_time(run_dir: RunDir) -> float:
    """Return when the run's adapter was written, seconds since 1970; 0 without one."""
    return run_dir.adapter_path.stat().st_mtime if run_dir.adapter_path.is_file() else 0.0


def format_adapter_name(file: Path, folders: Collection[Path]) -> str:
    """Return `dog`, `dog@500` or `dog@last` for a checkpoint, `dog@best` for a run's best step."""
    if file.name == RAW_NAME:
        checkpoint = file.parent.name.removeprefix("checkpoint-")
        return f"{clean_name(file.parent.parent.name)}@{checkpoint}"
    if file.name != PUBLISHED_NAME:
        return clean_name(file.stem)
    if file.parent.name == BEST_NAME and file.parent.parent not in folders:
        return f"{clean_name(file.parent.parent.name)}@best"
    return clean_name(file.parent.name)


def clean_name(text: str) -> str:
    """Return the name with only letters, digits, space and `.+-_`, for pages, tags and files."""
    return UNSAFE_CHARACTERS.sub("_", text).strip(" ._")[:60].rstrip(" .") or "adapter"


def is_file_inside(file: Path, folders: Collection[Path]) -> bool:
    """Return whether it is a regular file inside the folders, after following links."""
    try:
        target = file.resolve(strict=True)
        return target.is_file() and any(
            target.is_relative_to(folder.resolve()) for folder in folders
        )
    except (OSError, RuntimeError):  # circular links
        return False
