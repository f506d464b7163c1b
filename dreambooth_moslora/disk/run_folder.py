"""The run folder: the names of its files, which of its checkpoints are complete, and the adapters
in it.

Adapter files lie in folders of adapters and in runs. A user chooses one by the name that
`format_adapter_name` gives it.
"""

import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open

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
from dreambooth_moslora.errors import UserError, format_error

# The published LoRA, as diffusers names it, and A, B and M as they are trained.
PUBLISHED_NAME = "pytorch_lora_weights.safetensors"
RAW_NAME = "moslora_weights.safetensors"
# End of the name of the file for other programs, after the run's name.
KOHYA_SUFFIX = ".kohya.safetensors"
SETTINGS_NAME = "train_config.json"  # The settings of a run.
BEST_NAME = "best"  # Folder of the best evaluated step in a run.
METRICS_NAME = "metrics.jsonl"
LOG_NAME = "train.log"
SCORES_NAME = "scores.json"  # in a folder of `evaluate`
POSITION_NAME = "position.json"  # these two in a checkpoint
OPTIMIZER_NAME = "optimizer.pt"
CHECKPOINT_FILES = (POSITION_NAME, OPTIMIZER_NAME, RAW_NAME)  # Without one it is not complete.
MAX_NAME_BYTES = 200  # Of a run's name: files have 255, and their names add to it.
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


class RunDir:
    """Names in the output folder `path` of one run. Nothing is made until something is written."""

    def __init__(self, path: str | Path):
        self.path = path = Path(path)
        self.adapter_path = path / PUBLISHED_NAME
        self.card_path = path / "README.md"
        self.config_path = path / SETTINGS_NAME
        self.metrics_path = path / METRICS_NAME
        self.log_path = path / LOG_NAME
        self.samples_dir = path / "samples"
        self.photos_dir = path / "photos"  # the page's copies
        self.class_images_dir = path / "class_images"
        self.masks_dir = path / "masks"  # made by --masks auto
        self.captions_path = path / "captions.json"  # made by --captions auto
        self.best_dir = path / BEST_NAME
        self.evaluation_dir = path / "evaluation"  # what `evaluate` wrote
        # a checkpoint at the end, if its step is no multiple of --checkpointing_steps
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
        """The text of the model card; None without one. Raises UserError."""
        return read_stored_text(self.card_path) if self.card_path.is_file() else None

    def get_checkpoint_path(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def list_checkpoints(self) -> list[Path]:
        """Complete checkpoints by step, including `last`."""
        return [path for path in self.list_checkpoint_folders() if is_checkpoint(path)]

    def list_checkpoint_folders(self) -> list[Path]:
        """All folders with a checkpoint's name, by step: complete, damaged, or not a run's."""
        if not self.path.is_dir():
            return []
        restore_directories(self.path)
        named = []
        for path in self.path.iterdir():
            if parse_checkpoint_step(path) is not None or path == self.last_dir:
                named.append(path)
        return sorted(named, key=read_checkpoint_step)

    def find_latest_checkpoint(self) -> Path | None:
        """The complete checkpoint of the most steps; None without one."""
        found = self.list_checkpoints()
        return found[-1] if found else None

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
        """How its last run ended: `done`, `interrupted` or `failed`; "" if it has not."""
        last = self.read_events()[-1:]
        return last[0]["state"] if last and last[0]["type"] == RunEnded.kind else ""

    def read_scores(self) -> list[StepEvaluated]:
        return filter_events(StepEvaluated, self.read_events(StepEvaluated.kind))


def check_name(name: str) -> None:
    """Raises UserError for a name that files cannot have here, with room for suffixes and
    temporaries' names."""
    if name in ("", ".", "..") or not name.isprintable() or Path(name).name != name:
        raise UserError(f"{name!a} cannot be part of a file's name; give the adapter a plain name")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise UserError(
            f"the name {name} is too long: an adapter's has at most {MAX_NAME_BYTES} bytes"
        )


def parse_checkpoint_step(path: PurePath) -> int | None:
    """The step in a checkpoint's name; None for another name."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def read_checkpoint_step(path: Path) -> int:
    """The step of a checkpoint: from its name, or for `last` from its position file; -1 when that
    is damaged."""
    named = parse_checkpoint_step(path)
    if named is not None:
        return named
    with suppress(UserError):
        return read_json(path / POSITION_NAME, Position).step
    return -1


@dataclass(frozen=True)
class Position:
    """Where a checkpoint was taken, in its position.json."""

    step: int  # optimizer steps done
    seed: int  # names every draw
    optimizer: str = ""  # `get_optimizer_name`
    # Digests of the base's parts (`identify_base`); a sentence in earlier versions.
    base: dict[str, str] | str = field(default_factory=dict)
    digest: str = ""  # of the position and the files beside it (`digest_of`)
    # What the run was trained with, to say what a resumed one changes; {} in earlier versions.
    settings: dict[str, Any] = field(default_factory=dict)  # by name, as JSON
    photos: dict[str, str] = field(default_factory=dict)  # `hash_files`


def is_checkpoint(path: Path) -> bool:
    """Whether all files of a checkpoint exist; their content is not checked."""
    files = [path / name for name in CHECKPOINT_FILES]
    return all(file.is_file() and file.stat().st_size for file in files)


# A sentence of each model card of this program.
CARD_SIGNATURE = "Made with dreambooth_moslora"
# The trainer's, as a card names them; other files there are not the run's
CARD_PICTURE = re.compile(r"\burl: (image_\d+\.png)")


def is_card(text: str) -> bool:
    return CARD_SIGNATURE in text


def list_card_pictures(text: str) -> set[str]:
    """The picture files that a card names; empty for a text that is not a card of this program."""
    return set(CARD_PICTURE.findall(text)) if is_card(text) else set()


NO_ADAPTER = "none"  # The choice of no adapter; no file gets this name.
PEFT_CONFIG_NAME = "adapter_config.json"  # beside adapter_model.safetensors, by PEFT
# What a name to show cannot have.
UNSAFE_CHARACTERS = re.compile(r"[^\w .+-]+")


def find_weights(path: str | Path) -> Path:
    """An adapter's file: the path, a run's published or a checkpoint's raw one. Raises UserError,
    also for pickles."""
    path = expand_user_path(path)
    if path.is_dir():
        path = path / (PUBLISHED_NAME if (path / PUBLISHED_NAME).is_file() else RAW_NAME)
    if not path.is_file():
        # A run's folder without the adapter, which is written at the end
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


def read_header(file: Path) -> dict[str, str]:
    """The strings in the header of a safetensors file; no tensor is read. Raises UserError for any
    other file."""
    try:
        with safe_open(file, framework="np") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"it is not a safetensors file, or it is damaged: {format_error(error)}"
        ) from None


def map_adapter_names(
    files: Iterable[Path], folders: Collection[Path], reserved_names: Collection[str] = ()
) -> dict[str, Path]:
    """Name -> file, in order, with a number if `taken`; without links out of `folders`."""
    found: dict[str, Path] = {}
    known = {NO_ADAPTER, *reserved_names}
    for file in files:
        if not is_file_inside(file, folders):
            continue
        name = find_free_name(format_adapter_name(file, folders), known.__contains__, " ")
        known.add(name)
        found[name] = file
    return found


def list_run_adapters(runs: Collection[Path]) -> list[Path]:
    """Adapters of runs, the newest first, with the best step; then checkpoints, the last of a run
    first."""
    # The best step's adapter lies beside the run's own, whose time counts.
    found = []
    for run_dir in sorted(map(RunDir, runs), key=get_publish_time, reverse=True):
        places = (run_dir.adapter_path, run_dir.best_dir / PUBLISHED_NAME)
        found += [file for file in places if file.is_file()]

    def run_and_step(file: Path) -> tuple[str, int]:
        return file.parent.parent.name, -(parse_checkpoint_step(file.parent) or 0)

    checkpoints = [file for run in runs for file in run.glob(f"checkpoint-*/{RAW_NAME}")]
    return [*found, *sorted(checkpoints, key=run_and_step)]


def get_publish_time(run_dir: RunDir) -> float:
    """When the run's adapter was written; 0 without one."""
    return run_dir.adapter_path.stat().st_mtime if run_dir.adapter_path.is_file() else 0.0


def format_adapter_name(file: Path, folders: Collection[Path]) -> str:
    """`dog`, `dog@500` and `dog@last` for a checkpoint, `dog@best` for the best step of a run."""
    if file.name == RAW_NAME:
        checkpoint = file.parent.name.removeprefix("checkpoint-")
        return f"{clean_name(file.parent.parent.name)}@{checkpoint}"
    if file.name != PUBLISHED_NAME:
        return clean_name(file.stem)
    if file.parent.name == BEST_NAME and file.parent.parent not in folders:
        return f"{clean_name(file.parent.parent.name)}@best"
    return clean_name(file.parent.name)


def clean_name(text: str) -> str:
    """A name to show, to put in a tag and to use for a file: letters, digits, space and `.+-_`."""
    return UNSAFE_CHARACTERS.sub("_", text).strip(" ._")[:60].rstrip(" .") or "adapter"


def is_file_inside(file: Path, folders: Collection[Path]) -> bool:
    """Whether it is a regular file inside the folders, after following links. Circular links and
    pipes are not."""
    try:
        place = file.resolve(strict=True)
        return place.is_file() and any(place.is_relative_to(folder.resolve()) for folder in folders)
    except (OSError, RuntimeError):
        return False
