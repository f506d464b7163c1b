"""Metrics of a run from its events, its settings, and a newer report of `evaluate`."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dreambooth_moslora.disk import queue
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.disk.run_folder import SCORES_NAME, RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos import folder, photo_file
from dreambooth_moslora.settings import config_files, train_config
from dreambooth_moslora.values import is_finite_number

MIN_LIKENESS_GAIN = 0.1
"""A rise over the base below which distances from class to subject are not measured."""
NON_SCORE_FIELDS = ("step", "time", "photos")


@dataclass(frozen=True)
class RunMetrics:
    """Metrics of a run.

    config: its settings
    state, message: how it ended, as its last event says
    step: the last that was taken
    photos: how many; `largest` counts those of the largest of several subjects
    without_bare_prompt: photos whose captions lack the instance prompt
    scores: the latest
    copy_alarm: whether images repeat photos
    likeness, score: (step, value) of each evaluation
    processes: that trained together
    time: of the last event, in seconds
    planned_steps: its optimizer steps
    saved: the step of the newest checkpoint; 0 without one
    is_training: whether another process trains it now
    folder: the run's
    leaked: the thing that came with a style
    photo_likeness: of each photo, by name, to the others
    verdict: whether reference images would do as well
    no_score: why there is no score; "" where there is one
    """

    config: train_config.TrainConfig
    state: str = ""
    message: str = ""
    step: int = 0
    photos: int | None = None
    largest_subject_photos: int | None = None
    without_bare_prompt: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    copy_alarm: bool = False
    likeness: Sequence[tuple[int, float]] = ()
    score: Sequence[tuple[int, float]] = ()
    processes: int = 1
    time: float = 0.0
    planned_steps: int | None = None
    saved: int = 0
    is_training: bool = False
    folder: Path = Path()
    leaked: str = ""
    photo_likeness: Mapping[str, float] = field(default_factory=dict)
    verdict: str = ""
    no_score: str = ""

    @property
    def exposures(self) -> float | None:
        """Number of times each photo was shown."""
        if not self.photos:
            return None
        photos_a_step = self.config.train_batch_size * self.config.gradient_accumulation_steps
        return self.step * photos_a_step * self.processes / self.photos

    def compute_shift(self, name: str) -> float | None:
        """Return how far `pres` (the class) or `dino_bare` moved: 0 as the base shows the class, 1
        at the subject."""
        current = self.scores.get(name)
        start, end = self.scores.get("pres_base"), self.scores.get("dino")
        if current is None or start is None or end is None or end - start < MIN_LIKENESS_GAIN:
            return None
        return (current - start) / (end - start)


def build_run_metrics(
    records: Sequence[Mapping[str, Any]],
    config: train_config.TrainConfig,
    photos: Mapping[str, int] = {},
) -> RunMetrics:
    """Figures from the lines of `metrics.jsonl`. `photos` is what is known of the photos, for a run
    whose evaluations do not tell it."""
    # By kind: of a resumed run the last start and end count.
    by_kind: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in records:
        by_kind[event["type"]].append(event)
    start, end, last = ([{}, *by_kind[kind]][-1] for kind in ("start", "end", "evaluation"))
    steps_taken = [event["step"] for event in by_kind["step"] if not event.get("skipped")]
    saved = [event["step"] for event in by_kind["checkpoint"]]

    # What the latest evaluation says of the photos, and of the adapter.
    photo_facts = {**photos, **last.get("photos", {})}
    scores = {name: value for name, value in last.items() if name not in NON_SCORE_FIELDS}
    return RunMetrics(
        config=config,
        state=end.get("state", ""),
        message=end.get("message", ""),
        step=max(steps_taken, default=0),
        photos=photo_facts.get("count"),
        largest_subject_photos=photo_facts.get("largest"),
        without_bare_prompt=photo_facts.get("without_bare_prompt", 0),
        scores=filter_numbers(scores),
        no_score=last.get("no_score", ""),
        copy_alarm=last.get("copy_alarm", False),
        likeness=build_curve(by_kind["evaluation"], "dino"),
        score=build_curve(by_kind["evaluation"], "score"),
        processes=start.get("processes", 1),
        time=max((event.get("time", 0.0) for event in records), default=0.0),
        planned_steps=start.get("max_train_steps"),
        saved=max(saved, default=0),
    )


def build_curve(evaluations: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of each evaluation, sorted; a step that was scored twice counts once."""
    values = {
        event["step"]: event[name] for event in evaluations if is_finite_number(event.get(name))
    }
    return sorted(values.items())


def filter_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the values that are numbers."""
    return {name: value for name, value in values.items() if is_finite_number(value)}


def load_run_metrics(
    run_dir: RunDir, photos: Sequence[photo_file.Photo] | None = None
) -> RunMetrics:
    """Load a run's metrics: events, configuration, and a newer report of `evaluate`. Raises
    UserError for a folder without a run."""
    for path in (run_dir.config_path, run_dir.metrics_path):
        if not path.is_file():
            raise UserError(f"{run_dir.path} holds no run: {path.name} is not there.")
    config = parse_known_config(read_json(run_dir.config_path))

    # The photos, if they are still here.
    if photos is None:
        with suppress(UserError):
            photos = folder.build_photo_report(config).photos
    facts = {}
    if photos:
        facts["count"] = len(photos)
        facts["without_bare_prompt"] = sum(photo.bare_prompt is not None for photo in photos)
        if len(config.subjects) > 1:
            facts["largest"] = max(photo_file.count_photos(photos))

    # What the run wrote, and what it is now.
    metrics = replace(
        build_run_metrics(run_dir.read_events(), config, facts),
        is_training=is_run_active(run_dir),
        folder=run_dir.path,
    )
    return merge_report(metrics, run_dir)


def is_run_active(run_dir: RunDir) -> bool:
    """Return whether a run trains there now, or nobody can tell."""
    try:
        queue.check_unlocked(run_dir.path)
    except (UserError, OSError):
        return True
    return False


def parse_known_config(values: Mapping[str, Any]) -> train_config.TrainConfig:
    """Parse a run's configuration, without settings that are unknown here. Raises UserError for
    impossible values."""
    return train_config.TrainConfig.from_dict(config_files.drop_removed_settings(values))


def merge_report(metrics: RunMetrics, run_dir: RunDir) -> RunMetrics:
    """Return the metrics with the scores of a newer `evaluation/scores.json`. Raises UserError if
    that is not JSON."""
    path = run_dir.evaluation_dir / SCORES_NAME
    if not path.is_file():
        return metrics

    # An older one is of an adapter that is gone; another scale, or one of several subjects, is
    # another question.
    report = read_json(path)
    if report["time"] < metrics.time:
        return metrics
    is_of_one = len(metrics.config.subjects) > 1 and "subjects" not in report
    if is_of_one or report["protocol"]["adapter_scale"] != 1:
        return metrics

    # Its scores, by the names that an evaluation in training gives them.
    alarm = report["copy_alarm"]
    values = {name: interval["mean"] for name, interval in report["scores"].items()}
    values |= report["relative"]
    values |= {"copied": alarm["share"], "score": report["score"]}
    return replace(
        metrics,
        scores=filter_numbers(values),
        no_score=report.get("no_score", ""),
        copy_alarm=alarm["raised"],
        leaked=report["leaked"],
        photo_likeness=report.get("dino_of_each_photo", {}),
        verdict=(report["references"] or {}).get("verdict", ""),
    )
