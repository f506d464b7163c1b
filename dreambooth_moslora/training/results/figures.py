"""The figures of a run, read from its folder: events, configuration, and the report of `evaluate`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dreambooth_moslora.core.config.files import read_json_table
from dreambooth_moslora.core.config.train_config import FIELD_TYPES, TrainConfig
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.numbers import is_finite_number
from dreambooth_moslora.core.run_files.run_folder import RunDir

__all__ = ["Figures", "figures_from", "figures_of", "known_config", "with_report"]

LEAST_LIKENESS = 0.1
"""If the likeness rises by less over the base, the distance from class to subject is too small to measure against."""
NO_SCORES = ("step", "time", "photos")
"""Fields of an evaluation that are not scores."""


@dataclass(frozen=True)
class Figures:
    """The figures of a run.

    `scores` are the latest ones; `likeness` and `score` are (step, value) of each evaluation.
    """

    config: TrainConfig
    state: str = ""
    message: str = ""
    step: int = 0
    skipped: int = 0
    photos: int | None = None
    nearness: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    copy_alarm: bool = False
    likeness: Sequence[tuple[int, float]] = ()
    score: Sequence[tuple[int, float]] = ()

    @property
    def exposures(self) -> float | None:
        """How often each photo was shown, if the run used one device."""
        if not self.photos:
            return None
        photos_a_step = self.config.train_batch_size * self.config.gradient_accumulation_steps
        return self.step * photos_a_step / self.photos

    @property
    def class_moved(self) -> float | None:
        """How far the class moved: 0 as the base draws it, 1 at the subject. None without the scores."""
        here, start, end = (self.scores.get(name) for name in ("pres", "pres_base", "dino"))
        if here is None or start is None or end is None or end - start < LEAST_LIKENESS:
            return None
        return (here - start) / (end - start)


def figures_from(records: Sequence[Mapping[str, Any]], config: TrainConfig, photos: int | None = None) -> Figures:
    """Figures from the lines of `metrics.jsonl`, which may have been edited.

    `photos` is their number if no line has it.
    """
    steps = [event for event in records if event.get("type") == "step"]
    scored = [event for event in records if event.get("type") == "evaluation"]
    ends = [event for event in records if event.get("type") == "end"]
    last = scored[-1] if scored else {}
    about = as_table(last.get("photos"))
    count = number(about.get("count"))
    return Figures(
        config=config,
        state=str(ends[-1].get("state", "")) if ends else "",
        message=str(ends[-1].get("message", "")) if ends else "",
        step=max((event.get("step") or 0 for event in steps if not event.get("skipped")), default=0),
        skipped=sum(bool(event.get("skipped")) for event in steps),
        photos=photos if count is None else int(count),
        nearness=number(about.get("nearness")),
        scores=numbers({name: value for name, value in last.items() if name not in NO_SCORES}),
        copy_alarm=last.get("copy_alarm") is True,
        likeness=curve(scored, "dino"),
        score=curve(scored, "score"),
    )


def curve(scored: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of each evaluation, sorted; a step that was scored twice counts once."""
    values = {event.get("step") or 0: number(event.get(name)) for event in scored}
    return sorted((step, value) for step, value in values.items() if value is not None)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: known for name, value in values.items() if (known := number(value)) is not None}


def number(value: Any) -> float | None:
    return float(value) if is_finite_number(value) else None


def figures_of(run_dir: RunDir) -> Figures:
    """The figures of a run folder: its events, its configuration, and the report of `evaluate` if that is newer.

    Raises UserError when the folder holds no run.
    """
    for path in (run_dir.config_path, run_dir.metrics_path):
        if not path.is_file():
            raise UserError(f"{run_dir.path} holds no run: {path.name} is not there.")
    config = known_config(read_json_table(run_dir.config_path))
    found = figures_from(run_dir.read_metrics(), config, count_photos(config))
    return with_report(found, run_dir)


def known_config(values: Mapping[str, Any]) -> TrainConfig:
    """The configuration of a run. Settings of other versions that this one does not know are left out.

    Raises UserError for values that no run can have.
    """
    return TrainConfig.from_dict({name: value for name, value in values.items() if name in FIELD_TYPES})


def count_photos(config: TrainConfig) -> int | None:
    """The number of the run's photos; None when they can no longer be found, or are from the hub."""
    from dreambooth_moslora.photos.folder import photo_report

    try:
        return None if config.dataset_name else len(photo_report(config).photos)
    except UserError:
        return None


def with_report(found: Figures, run_dir: RunDir) -> Figures:
    """The figures, with the scores in `evaluation/scores.json` if that is newer; it is based on more pictures.

    Raises UserError for a damaged file.
    """
    path = run_dir.path / "evaluation" / "scores.json"
    if not path.is_file() or path.stat().st_mtime < run_dir.metrics_path.stat().st_mtime:
        return found
    report = read_json_table(path)
    tables, relative, alarm = (as_table(report.get(name)) for name in ("scores", "relative", "copy_alarm"))
    values = {name: as_table(interval).get("mean") for name, interval in tables.items()}
    values |= {**relative, "copied": alarm.get("share"), "score": report.get("score")}
    return replace(found, scores=numbers(values), copy_alarm=alarm.get("raised") is True)


def as_table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
