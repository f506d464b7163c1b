"""What a run has measured: its events, its settings, and a newer report of `evaluate`, read with
care."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dreambooth_moslora.disk import queue
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos import folder, photo_file
from dreambooth_moslora.settings import table
from dreambooth_moslora.values import is_finite_number

LEAST_LIKENESS = 0.1
"""A rise over the base below which distances from class to subject are not measured."""
NO_SCORES = ("step", "time", "photos")
"""Fields of an evaluation that are not scores."""


@dataclass(frozen=True)
class Figures:
    """What a run has measured.

    config: its settings
    state, message: how it ended, as its last event says
    step: the last that was taken
    photos: how many; `largest` counts those of the largest of several subjects
    without_bare_prompt: photos whose captions lack the instance prompt
    scores: the latest
    copy_alarm: whether pictures repeat photos
    likeness, score: (step, value) of each evaluation
    processes: that trained together
    time: of the last event, in seconds
    planned: its optimizer steps
    saved: the step of the newest checkpoint; 0 without one
    is_training: whether another process trains it now
    folder: the run's
    verdict: whether reference pictures would do as well
    """

    config: table.TrainConfig
    state: str = ""
    message: str = ""
    step: int = 0
    photos: int | None = None
    largest: int | None = None
    without_bare_prompt: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    copy_alarm: bool = False
    likeness: Sequence[tuple[int, float]] = ()
    score: Sequence[tuple[int, float]] = ()
    processes: int = 1
    time: float = 0.0
    planned: int | None = None
    saved: int = 0
    is_training: bool = False
    folder: Path = Path()
    verdict: str = ""

    @property
    def exposures(self) -> float | None:
        """How often each photo was shown."""
        if not self.photos:
            return None
        photos_a_step = self.config.train_batch_size * self.config.gradient_accumulation_steps
        return self.step * photos_a_step * self.processes / self.photos

    def moved(self, name: str) -> float | None:
        """How far `pres` (the class) or `dino_bare` moved: 0 as the base draws the class, 1 at the
        subject."""
        here = self.scores.get(name)
        start, end = self.scores.get("pres_base"), self.scores.get("dino")
        if here is None or start is None or end is None or end - start < LEAST_LIKENESS:
            return None
        return (here - start) / (end - start)


def figures_from(
    records: Sequence[Mapping[str, Any]], config: table.TrainConfig, photos: Mapping[str, int] = {}
) -> Figures:
    """Figures from the lines of `metrics.jsonl`, read with care: a line may lack any field.
    `photos` is what is known of the photos, for a run whose evaluations do not tell it."""

    def of_kind(kind: str) -> list[Mapping[str, Any]]:
        return [event for event in records if event.get("type") == kind]

    def last_of(kind: str) -> Mapping[str, Any]:
        return [{}, *of_kind(kind)][-1]

    # A resumed run has several starts and ends; the last ones count.
    start, end = last_of("start"), last_of("end")
    taken = [event.get("step") or 0 for event in of_kind("step") if not event.get("skipped")]
    saved = [event.get("step") or 0 for event in of_kind("checkpoint")]

    # The latest scores, and what that evaluation says of the photos.
    scored = of_kind("evaluation")
    last = last_of("evaluation")
    about = {**photos, **as_table(last.get("photos"))}
    count, largest = number(about.get("count")), number(about.get("largest"))
    return Figures(
        config=config,
        state=str(end.get("state", "")),
        message=str(end.get("message", "")),
        step=max(taken, default=0),
        photos=None if count is None else int(count),
        largest=None if largest is None else int(largest),
        without_bare_prompt=int(number(about.get("without_bare_prompt")) or 0),
        scores=numbers({name: value for name, value in last.items() if name not in NO_SCORES}),
        copy_alarm=last.get("copy_alarm") is True,
        likeness=curve(scored, "dino"),
        score=curve(scored, "score"),
        processes=int(number(start.get("processes")) or 1),
        time=max((number(event.get("time")) or 0.0 for event in records), default=0.0),
        planned=int(number(start.get("max_train_steps")) or 0) or None,
        saved=max(saved, default=0),
    )


def curve(scored: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of each evaluation, sorted; a step that was scored twice counts once."""
    values = {event.get("step") or 0: number(event.get(name)) for event in scored}
    return sorted((step, value) for step, value in values.items() if value is not None)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Those that are numbers."""
    found = {name: number(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}


def number(value: Any) -> float | None:
    """The value as a number; None for anything else, and for NaN and infinity."""
    return float(value) if is_finite_number(value) else None


def figures_of(run_dir: RunDir, photos: Sequence[photo_file.Photo] | None = None) -> Figures:
    """A run's figures: events, configuration, and a newer report of `evaluate`. Raises UserError
    for no run."""
    for path in (run_dir.config_path, run_dir.metrics_path):
        if not path.is_file():
            raise UserError(f"{run_dir.path} holds no run: {path.name} is not there.")
    config = known_config(read_json(run_dir.config_path))

    # The photos, if they are still here.
    if photos is None:
        with suppress(UserError):
            photos = folder.photo_report(config).photos
    facts = {}
    if photos:
        facts["count"] = len(photos)
        facts["without_bare_prompt"] = sum(photo.bare_prompt is not None for photo in photos)
        if len(config.subjects) > 1:
            facts["largest"] = max(photo_file.counts_of(photos))

    # What the run wrote, and what it is now.
    found = replace(
        figures_from(run_dir.read_metrics(), config, facts),
        is_training=is_held(run_dir),
        folder=run_dir.path,
    )
    return with_report(found, run_dir)


def is_held(run_dir: RunDir) -> bool:
    """Whether a run trains there now, or nobody can tell."""
    try:
        queue.check_free(run_dir.path)
    except (UserError, OSError):
        return True
    return False


def known_config(values: Mapping[str, Any]) -> table.TrainConfig:
    """A run's configuration, without settings that are unknown here. Raises UserError for
    impossible values."""
    known = {name: value for name, value in values.items() if name in table.FIELD_TYPES}
    return table.TrainConfig.from_dict(known)


def with_report(found: Figures, run_dir: RunDir) -> Figures:
    """The figures, with the scores of a newer `evaluation/scores.json`. Raises UserError if that is
    damaged."""
    path = run_dir.evaluation_dir / "scores.json"
    if not path.is_file():
        return found

    # An older one is of an adapter that is gone; another scale, or one of several subjects, is
    # another question.
    report = read_json(path)
    if (number(report.get("time")) or 0.0) < found.time:
        return found
    is_of_one = len(found.config.subjects) > 1 and "subjects" not in report
    if is_of_one or as_table(report.get("protocol")).get("adapter_scale", 1) != 1:
        return found

    # Its scores, by the names that an evaluation in training gives them.
    intervals = as_table(report.get("scores"))
    alarm = as_table(report.get("copy_alarm"))
    values = {name: as_table(interval).get("mean") for name, interval in intervals.items()}
    values |= as_table(report.get("relative"))
    values |= {"copied": alarm.get("share"), "score": report.get("score")}
    return replace(
        found,
        scores=numbers(values),
        copy_alarm=alarm.get("raised") is True,
        verdict=str(as_table(report.get("references")).get("verdict") or ""),
    )


def as_table(value: Any) -> Mapping[str, Any]:
    """The value if it is a table, else an empty one."""
    return value if isinstance(value, Mapping) else {}
