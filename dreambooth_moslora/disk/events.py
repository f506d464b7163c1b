"""Events of a run, one frozen dataclass each, and their file, `metrics.jsonl`, one JSON object a
line.

RunStarted  PhaseProgress*
(StepDone  SamplesSaved?  StepEvaluated?  CheckpointSaved?)*
AdapterExported  RunEnded
"""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from typing_extensions import TypedDict

from dreambooth_moslora.disk.contents import parse_json, read_stamp, read_stored_text
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.values import is_finite_number

MAX_EVENTS_BYTES = 64 * 2**20
"""Size limit of a file of events; 200,000 steps have less."""


def append_event(path: Path, event: dict[str, Any]) -> None:
    """Append one line. Numbers that JSON cannot hold (NaN, infinity) become null."""
    text = json.dumps(replace_nonfinite(event), ensure_ascii=False, allow_nan=False, default=str)
    line = f"{text}\n"
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a kill cut the last line off
                line = f"\n{line}"
        file.write(line.encode())


def read_events(path: Path, kind: str = "") -> list[dict[str, Any]]:
    """Return all events so far, or those of one kind.

    Incomplete lines, which a killed process leaves, are skipped. Raises UserError for a file that
    cannot be read or has more than MAX_EVENTS_BYTES.
    """
    mark = f'"{kind}"' if kind else ""
    matching_events = []
    for line in read_stored_text(path, MAX_EVENTS_BYTES).split("\n"):
        event = parse_event(line) if mark in line else None
        # The kind's name may also stand in another event's text.
        if event is not None and kind in ("", event["type"]):
            matching_events.append(event)
    return matching_events


def replace_nonfinite(value: Any) -> Any:
    """Return the value for JSON: None in place of NaN and infinity, at any depth."""
    if isinstance(value, dict):
        return {str(key): replace_nonfinite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_nonfinite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_event(line: str | bytes) -> dict[str, Any] | None:
    """Return the event in a line; None for any other line."""
    event: dict[str, Any] = {}
    with suppress(UserError):
        event = parse_json(line)
    is_event = isinstance(event.get("type"), str) and isinstance(event.get("step", 0), int)
    return event if is_event else None


@dataclass
class EventLog:
    """Events of a file, which is read again when it has changed."""

    path: Path
    events: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""  # why an existing file was not read
    _file_stamp: tuple[int, ...] = ()  # `read_stamp` of the file when it was read

    def refresh(self) -> "EventLog":
        """Read the file if it has changed. `problem` says why an existing file was not read."""
        file_stamp: tuple[int, ...] = ()
        with suppress(OSError):
            file_stamp = read_stamp(self.path)
        if file_stamp == self._file_stamp:
            return self

        # A resumed run replaces the file, so all of it is read.
        self._file_stamp = file_stamp
        self.events = []
        self.problem = ""
        try:
            self.events = read_events(self.path) if file_stamp else []
        except UserError as error:
            self.problem = str(error)
        return self

    def list_events(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of one kind."""
        return [event for event in self.events if event.get("type") == kind]

    def get_last(self, kind: str) -> dict[str, Any]:
        """Return the last event of a kind; {} without one."""
        return next(reversed(self.list_events(kind)), {})

    def list_since_start(self) -> list[dict[str, Any]]:
        """Return the events since the last start; a resumed run's file also has the earlier run's
        events."""
        starts = [i for i, event in enumerate(self.events) if event.get("type") == "start"]
        return self.events[starts[-1] :] if starts else []


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events."""

    kind: ClassVar[str]  # its `type` on disk
    time: float = field(default_factory=time.time)  # seconds since 1970


@dataclass(frozen=True)
class RunStarted(Event):
    """Start of a run, after its plan and before its base is loaded."""

    kind: ClassVar[str] = "start"
    max_train_steps: int
    config: dict[str, Any] = field(default_factory=dict)
    processes: int = 1


@dataclass(frozen=True)
class PhaseProgress(Event):
    """Progress of the work before, between and after the steps: `done` of `total` parts."""

    kind: ClassVar[str] = "phase"
    phase: str  # such as `loading`, `caching` or `exporting`
    done: int = 0
    total: int = 1


@dataclass(frozen=True)
class StepDone(Event):
    """Optimizer step with its losses. Times are in seconds."""

    kind: ClassVar[str] = "step"
    step: int
    loss: float | None = None  # None, as below, where there is none or it is not finite
    loss_instance: float | None = None
    loss_prior: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    step_sec: float | None = None
    eta_sec: float | None = None
    memory_gib: float | None = None
    skipped: bool = False  # fp16 overflowed; the step is repeated with a smaller scale


@dataclass(frozen=True)
class SamplesSaved(Event):
    """Sample images at the run's prompts."""

    kind: ClassVar[str] = "sample"
    step: int
    files: list[str]  # images relative to the run folder; each has its prompt and seed
    prompts: list[str]
    seeds: list[int]


class Best(TypedDict):
    """Best evaluation so far."""

    step: int
    score: float
    since: int  # evaluations


@dataclass(frozen=True)
class StepEvaluated(Event):
    """Scores of a step's adapter."""

    kind: ClassVar[str] = "evaluation"
    step: int
    scores: dict[str, float] = field(default_factory=dict)  # each a key of its own on disk
    best: Best | None = None  # by the highest of `scores["score"]`
    no_score: str = ""  # why `scores` has no "score"
    copy_alarm: bool = False
    cost: dict[str, float] = field(default_factory=dict)  # of this evaluation
    # `count`, `largest`, `without_bare_prompt`
    photos: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """Checkpoint, from which the run can be resumed."""

    kind: ClassVar[str] = "checkpoint"
    step: int
    path: str


@dataclass(frozen=True)
class AdapterExported(Event):
    """Published files of the adapter, and how exactly they load elsewhere."""

    kind: ClassVar[str] = "export"
    files: list[str]
    proof: dict[str, Any]


@dataclass(frozen=True)
class RunEnded(Event):
    """End of a run. Nothing follows it."""

    kind: ClassVar[str] = "end"
    state: str  # `done`, `interrupted` or `failed`
    step: int
    message: str = ""


EVENT_CLASSES: dict[str, type[Event]] = {kind.kind: kind for kind in Event.__subclasses__()}
"""`type` of a line on the disk -> class of its event."""
E = TypeVar("E", bound=Event)


def build_record(event: Event) -> dict[str, Any]:
    """Return the event as the JSON object of its line, each score under its own key."""
    values = asdict(event)
    return {"type": event.kind, "time": values.pop("time")} | values.pop("scores", {}) | values


def parse_record(record: Mapping[str, Any]) -> Event | None:
    """Return the event of one line; None for an unknown type, a missing field or a wrong type."""
    kind = EVENT_CLASSES.get(str(record.get("type")))
    if kind is None:
        return None
    names = {item.name for item in fields(kind)}
    values = {name: value for name, value in record.items() if name in names}
    if kind is StepEvaluated:
        # Numbers that no field has are the scores.
        values["scores"] = {
            name: float(value)
            for name, value in record.items()
            if name not in names and is_finite_number(value)
        }
    with suppress(UserError):
        return parse_json(json.dumps(values), kind)
    return None


def filter_events(kind: type[E], records: Iterable[Mapping[str, Any]]) -> list[E]:
    """Return the events of one kind among these lines."""
    events = map(parse_record, records)
    return [event for event in events if isinstance(event, kind)]
