"""A fleet's files: its list of subjects, and in each run folder the state of that run.

OUT/fleet.json          the names of its subjects
OUT/NAME/fleet.json     a `Record`, written when a training begins and when it has ended
OUT/fleet.stop          while it exists, running trainings end at a checkpoint and none begins
OUT/index.html          a page of all this for a person
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from dreambooth_moslora.core.atomic_files import atomic_write
from dreambooth_moslora.core.config.files import read_json_table
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.run_files.events import fits
from dreambooth_moslora.core.run_files.run_folder import RunDir, check_name

__all__ = [
    "FLEET_NAME",
    "INDEX_NAME",
    "Record",
    "STOP_NAME",
    "is_finished",
    "read_names",
    "read_record",
    "stop_path",
    "write_names",
    "write_record",
]

FLEET_NAME, INDEX_NAME, STOP_NAME = "fleet.json", "index.html", "fleet.stop"


@dataclass(frozen=True)
class Record:
    """`state` is waiting, running, done, interrupted or failed. `mark` identifies settings and photos
    (`subjects.mark_of`).

    `starts` counts the run's trainings. `seconds` is their total time, `hours` that time multiplied by the held
    `unit`s (GPUs or CPU cores). The time of a training whose machine was lost is not counted.
    """

    state: str
    mark: str = ""
    message: str = ""
    seconds: float = 0.0
    hours: float = 0.0
    unit: str = "CPU"
    starts: int = 0
    machine: str = ""


def read_record(run_dir: Path) -> Record | None:
    """None when the record is missing or cannot be read."""
    try:
        values = read_json_table(run_dir / FLEET_NAME)
        record = Record(**values)
    except (UserError, TypeError):
        return None
    return record if all(fits(getattr(record, item.name), item.type) for item in fields(record)) else None


def write_record(run_dir: Path, record: Record) -> None:
    atomic_write(run_dir / FLEET_NAME, json.dumps(asdict(record)) + "\n")


def is_finished(run_dir: Path, mark: str) -> bool:
    """Whether a run with this mark is done and its adapter exists."""
    record = read_record(run_dir)
    is_done = record is not None and record.state == "done" and record.mark == mark
    return is_done and RunDir(run_dir).adapter_path.is_file()


def stop_path(out: Path) -> Path:
    return out / STOP_NAME


def write_names(out: Path, names: Sequence[str]) -> None:
    atomic_write(out / FLEET_NAME, json.dumps({"subjects": list(names)}) + "\n")


def read_names(out: Path) -> list[str]:
    """Raises UserError when there is no fleet."""
    path = out / FLEET_NAME
    if not path.is_file():
        raise UserError(f"{out} holds no fleet: {FLEET_NAME} is not there.")
    names = read_json_table(path).get("subjects")
    try:
        for name in names:
            check_name(name)
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: it names no subjects.") from error
    return names
