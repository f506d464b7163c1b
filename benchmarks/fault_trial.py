"""Trial of one fault: a home, the runs in it, and the file operation of an unbroken run at which
the fault happens."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.fault_runs import NAME, Reference, Run, RunEnd, Workshop, hash_published
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RunDir

__all__ = ["Trial", "track_operation", "pick_operation", "build_fault"]


@dataclass
class Trial:
    """Trial of one fault.

    row: its line in the table
    detail: what was done
    ended: ends of its runs
    killed: the harness ended a run
    wrong: published files that no unbroken run makes
    """

    workshop: Workshop
    name: str
    variant: str
    rng: random.Random
    row: str = ""
    detail: str = ""
    killed: bool = False
    ended: list[RunEnd] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    home: Path = Path()

    def create_home(self) -> None:
        self.home = self.workshop.create_home(self.name)

    def create_half_home(self) -> None:
        """Create a run that was stopped after two of its four steps."""
        self.home = self.workshop.create_half_home(self.name, self.variant)

    @property
    def reference(self) -> Reference:
        return self.workshop.references[self.variant]

    def start(self, before: Callable[[], object] = bool, **options: object) -> Run:
        return self.workshop.start(self.home, self.variant, before, **options)

    def end(self, run: Run) -> None:
        self.note(run.wait())

    def note(self, ended: RunEnd) -> None:
        """Record how a run ended, and check what it has published."""
        self.ended.append(ended)
        published = hash_published(self.home)
        if published.get(PUBLISHED_NAME) not in {None, *self.reference.steps}:
            self.wrong.append(PUBLISHED_NAME)
        if ended.code == 0 and published != self.reference.final:
            self.wrong.append("after the end")

    def run(self, before: Callable[[], object] = bool, **options: object) -> None:
        self.end(self.start(before, **options))

    def sample_moment(self) -> float:
        """Sample a second of a run's duration."""
        return self.rng.uniform(0, 1.1 * self.reference.seconds)

    def get_phase(self) -> str:
        """Return the phase of the last event in the run folder."""
        events = RunDir(self.home / NAME).read_events()
        last = events[-1] if events else {"type": "before the first event"}
        return str(last.get("phase", last["type"]))


PHASES = {
    "photos": ("photos",),
    "caching": ("cache",),
    "class images": ("class_images",),
    "checkpoint": ("checkpoint-",),
    "best": ("best",),
    "samples": ("samples",),
    "log": ("metrics.jsonl", "train.log", "train_config.json", "run.lock", "run.owner"),
    "publication": ("",),
}


def find_phase(path: str) -> str:
    return next(phase for phase, marks in PHASES.items() if any(mark in path for mark in marks))


def pick_operation(trial: Trial, kinds: tuple[str, ...] = ()) -> tuple[int, str]:
    """(number, phase): first a random phase, then one of its operations, so that short phases are
    not neglected."""
    phases: dict[str, list[int]] = {}
    for number, (kind, path) in enumerate(trial.reference.trace, 1):
        if kinds and kind not in kinds:
            continue
        phases.setdefault(find_phase(path), []).append(number)
    phase = trial.rng.choice(sorted(phases))
    return track_operation(trial, trial.rng.choice(phases[phase])), phase


def track_operation(trial: Trial, number: int) -> int:
    kind, path = trial.reference.trace[number - 1]
    trial.detail = f"operation {number}, {kind} {path}"
    return number


def build_fault(
    trial: Trial, mode: int, number: int, error: int = 0, sticky: bool = False
) -> Callable[[], None]:
    return partial(trial.workshop.shim.inject_fault, mode, number, error, sticky, trial.home)
