"""Files of a fleet: its subjects, the state of each, and the page that lists them.

OUT/fleet.json          the names of its subjects
OUT/NAME/fleet.json     a `Record`, written when a training begins and when it has ended
OUT/fleet.stop          while it exists, running trainings end at a checkpoint and none begins
OUT/index.html          a page of all this for a person

The state of a fleet is read from its files alone: the fleet need not be running. The page is one
file without scripts: small pictures are embedded, links lead to files beside it, and it contains no
path of the machine.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from dreambooth_moslora.disk import processes, run_folder
from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.errors import UserError, escape_control_characters
from dreambooth_moslora.pictures import encode_image_url, render
from dreambooth_moslora.training.run_advice import NOT_SCORED_NOTE, list_advice
from dreambooth_moslora.training.run_metrics import (
    build_run_metrics,
    merge_report,
    parse_known_config,
)

FLEET_NAME = "fleet.json"
"""Of a fleet the names of its subjects, of a run its `Record`."""
INDEX_NAME = "index.html"
"""The page of a fleet."""
STOP_NAME = "fleet.stop"
"""While it exists, the fleet is to stop."""


@dataclass(frozen=True)
class Record:
    """State of a subject's training, and its cost. A lost machine's time is not counted.

    state: one of STATES
    mark: a digest of settings and photos (`fleet_subjects.digest_run`)
    message: why it failed or was stopped
    seconds: the time of all its trainings
    hours: that time, times the `unit`s that were held
    unit: GPU or CPU
    starts: number of trainings
    machine: host name of the last one
    since: when the training before the first one of the mark began; 0.0 without one
    """

    state: str
    mark: str = ""
    message: str = ""
    seconds: float = 0.0
    hours: float = 0.0
    unit: str = "CPU"
    starts: int = 0
    machine: str = ""
    since: float = 0.0


def read_record(run_dir: Path) -> Record | None:
    """None when the record is missing or cannot be read."""
    with suppress(UserError):
        return read_json(run_dir / FLEET_NAME, Record)
    return None


def write_record(run_dir: Path, record: Record) -> None:
    write_atomic(run_dir / FLEET_NAME, json.dumps(asdict(record)) + "\n")


def record_ending(run_dir: Path, state: str, message: str = "") -> Record:
    """Write into the run's record how it ended, and return it. What it has cost is kept."""
    run_dir.mkdir(parents=True, exist_ok=True)
    record = replace(read_record(run_dir) or Record(state), state=state, message=message)
    write_record(run_dir, record)
    return record


def is_finished(run_dir: Path, mark: str) -> bool:
    """Return whether a run with this mark is done and its adapter exists."""
    record = read_record(run_dir)
    is_done = record is not None and record.state == "done" and record.mark == mark
    return is_done and run_folder.RunDir(run_dir).adapter_path.is_file()


def get_stop_path(out: Path) -> Path:
    """Return the file whose existence stops the fleet in `out`."""
    return out / STOP_NAME


def write_names(out: Path, names: Sequence[str]) -> None:
    """Write the fleet's list."""
    write_atomic(out / FLEET_NAME, json.dumps({"subjects": names}) + "\n")


def read_names(out: Path) -> list[str]:
    """Read the fleet's list. Raises UserError when there is no fleet."""
    path = out / FLEET_NAME
    if not path.is_file():
        raise UserError(f"{out} holds no fleet: {FLEET_NAME} is not there.")
    # others may write into a shared folder, and a name becomes a path
    try:
        names = read_json(path, dict[str, list[str]])["subjects"]
        for name in names:
            run_folder.check_name(name)
    except (UserError, KeyError) as error:
        raise UserError(f"{path} is damaged: it names no subjects.") from error
    return names


RECORD_STATES = ("failed", "interrupted", "running", "waiting", "done")
"""In the order in which a person should look at them. `running` means begun and not ended."""


@dataclass(frozen=True)
class SubjectRow:
    """Subject in the table of a fleet.

    name: of its run folder
    record: its state
    prompt: its instance prompt
    step, total_steps: so far, and of how many
    likeness: to the photos, by DINO; None where it was not scored
    alarms: advice that follows from its figures
    """

    name: str
    record: Record
    prompt: str = ""
    step: int = 0
    total_steps: int | None = None
    likeness: float | None = None
    alarms: Sequence[str] = ()


def load_rows(out: Path) -> list[SubjectRow]:
    """Load all subjects: failures, then alarms, then those least like their photos. Raises
    UserError for no fleet."""
    # each sort keeps the order of the one before among equals: the last counts most
    rows = sorted((load_row(out / name) for name in read_names(out)), key=lambda row: row.name)
    rows.sort(key=lambda row: 2.0 if row.likeness is None else row.likeness)
    return sorted(rows, key=lambda row: (RECORD_STATES.index(row.record.state), -len(row.alarms)))


def load_row(run_dir: Path) -> SubjectRow:
    """Load a row from the files of a run; from the record alone when they are missing or
    damaged."""
    record = read_record(run_dir)
    if record is None or record.state not in RECORD_STATES:
        record = Record("waiting")
    try:
        run = run_folder.RunDir(run_dir)
        # what was asked for, and what has happened so far
        config = parse_known_config(read_json(run_dir / processes.JOB_CONFIG_NAME))
        events = run.read_events()
        run_metrics = build_run_metrics(events, config)
        if events:
            run_metrics = merge_report(run_metrics, run)

        # of a run that was resumed, the last start counts
        total_steps = None
        for event in events:
            if event.get("type") == "start":
                total_steps = event.get("max_train_steps")

        # advice is about a finished training
        advice = list_advice(run_metrics) if record.state == "done" else []
        return SubjectRow(
            name=run_dir.name,
            record=record,
            prompt=config.instance_prompt,
            step=run_metrics.step,
            total_steps=total_steps,
            likeness=run_metrics.scores.get("dino"),
            alarms=[line for line in advice if not line.startswith(NOT_SCORED_NOTE)],
        )
    except (OSError, UserError):
        return SubjectRow(run_dir.name, record)


def format_status(rows: Sequence[SubjectRow]) -> list[str]:
    """Format the count of each state, the cost, and a line for each subject that needs attention or
    is running."""
    counts = {state: sum(row.record.state == state for row in rows) for state in RECORD_STATES}
    state_counts = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    lines = [f"{len(rows)} subjects: {state_counts}", f"cost so far: {format_cost(rows)}"]
    for row in rows:
        if row.record.state in ("waiting", "done") and not row.alarms:
            continue
        line = f"{row.name}: {row.record.state}"
        if row.step:
            line += f", step {row.step}"
            line += f" of {row.total_steps}" if row.total_steps else ""
        if more := row.record.message or "; ".join(row.alarms):
            line += f": {more}"
        lines.append(line)
    return lines


def format_cost(rows: Sequence[SubjectRow]) -> str:
    """Hours of GPUs and of cores, in words."""
    spent = []
    for unit in ("GPU", "CPU"):
        hours = sum(row.record.hours for row in rows if row.record.unit == unit)
        if hours:
            spent.append(f"{hours:.2f} {unit}-hours")
    return ", ".join(spent) or "nothing"


SHEET_PX = 320
"""Longest side of a contact sheet in the page."""
MAX_SHEETS = 500
"""Contact sheets in the page. The most urgent subjects come first, so those without a sheet matter
least."""
PATH_PATTERN = re.compile(
    r"(?<![\w/\\])(?:[A-Za-z]:)?(?:[\\/][^\\/:;,'\"()]*(?=[\\/]))*[\\/][^\\/\s:;,'\"()]+[\\/]?"
)
"""A space inside a folder's name belongs to the path; a space in the last part ends it."""


def write_index(out: Path, rows: Sequence[SubjectRow]) -> Path:
    """Write the page of `rows`, in their order (that of `load_rows`). Returns the file."""
    # what the template shows of each subject
    page_rows = []
    for number, row in enumerate(rows):
        sheet = run_folder.RunDir(out / row.name).contact_sheet_path
        moods = {"failed": "bad", "done": "bad" if row.alarms else "good"}
        looks = [row.record.message, *row.alarms]
        page_rows.append(
            {
                "row": row,
                "name": escape_control_characters(row.name),
                "mood": moods.get(row.record.state, "faint"),
                "looks": [
                    remove_paths(escape_control_characters(text), out) for text in looks if text
                ],
                "sheet": encode_sheet(sheet) if number < MAX_SHEETS else "",
                "link": f"{quote(row.name)}/{quote(sheet.name)}",
            }
        )

    summary = f"{format_status(rows)[0]}; cost: {format_cost(rows)}"
    page = render(
        "fleet.html", title=f"Fleet of {len(rows)} subjects", about=summary, rows=page_rows
    )
    write_atomic(out / INDEX_NAME, page)
    return out / INDEX_NAME


def encode_sheet(path: Path) -> str:
    """Encode a small contact sheet as the address of a picture; empty when none can be read."""
    try:
        with Image.open(path) as sheet:
            return encode_image_url(sheet, SHEET_PX)
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""


def remove_paths(text: str, out: Path) -> str:
    """Cut each path in the message to its last part."""
    for folder in {str(out), str(out.resolve())}:
        text = text.replace(f"{folder}/", "")
    return PATH_PATTERN.sub(lambda match: re.split(r"[\\/]", match[0].rstrip("\\/"))[-1], text)
