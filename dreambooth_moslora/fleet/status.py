"""The state of a fleet, read from its files alone: the fleet need not be running."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dreambooth_moslora.core.config.files import read_json_table
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.run_files.run_folder import RunDir
from dreambooth_moslora.core.run_files.training_process import CONFIG_NAME
from dreambooth_moslora.fleet.records import Record, read_names, read_record
from dreambooth_moslora.training.results.explain import alarms_of
from dreambooth_moslora.training.results.figures import figures_from, known_config, with_report

__all__ = ["Row", "rows_of", "status_lines"]

STATES = ("failed", "interrupted", "running", "waiting", "done")
"""In the order in which a person should look at them. `running` means begun and not ended."""
NO_RECORD = Record("waiting")


@dataclass(frozen=True)
class Row:
    """One subject: its record, its prompt, the step it has reached, its likeness to the photos, and its alarms."""

    name: str
    record: Record
    words: str = ""
    step: int = 0
    total_steps: int | None = None
    likeness: float | None = None
    alarms: Sequence[str] = field(default_factory=list)

    @property
    def urgency(self) -> tuple:
        """Sort key: failures first, then alarms, then the subjects least like their photos."""
        unlike = 2.0 if self.likeness is None else self.likeness
        return STATES.index(self.record.state), -len(self.alarms), unlike, self.name


def rows_of(out: Path) -> list[Row]:
    """All subjects, the most urgent first. Raises UserError when there is no fleet."""
    return sorted((row_of(out / name) for name in read_names(out)), key=lambda row: row.urgency)


def row_of(run_dir: Path) -> Row:
    record = read_record(run_dir) or NO_RECORD
    record = record if record.state in STATES else NO_RECORD
    try:
        config = known_config(read_json_table(run_dir / CONFIG_NAME))
        return with_figures(Row(run_dir.name, record, config.instance_prompt), RunDir(run_dir), config)
    except (OSError, UserError):
        return Row(run_dir.name, record)


def with_figures(row: Row, run_dir: RunDir, config: TrainConfig) -> Row:
    events = run_dir.read_metrics()
    found = figures_from(events, config)
    found = with_report(found, run_dir) if events else found
    totals = [event.get("max_train_steps") for event in events if event.get("type") == "start"]
    alarms = alarms_of(found) if row.record.state == "done" else []
    likeness = found.scores.get("dino")
    return Row(row.name, row.record, row.words, found.step, totals[-1] if totals else None, likeness, alarms)


def status_lines(rows: Sequence[Row]) -> list[str]:
    """The count of each state, the cost, and a line for each subject that needs attention or is running."""
    counts = {state: sum(row.record.state == state for row in rows) for state in STATES}
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    lines = [f"{len(rows)} subjects: {said}", f"cost so far: {cost_of([row.record for row in rows])}"]
    return lines + [f"{row.name}: {standing(row)}" for row in rows if is_told(row)]


def is_told(row: Row) -> bool:
    return row.record.state not in ("waiting", "done") or bool(row.alarms)


def standing(row: Row) -> str:
    """One subject in one line."""
    far = f", step {row.step}" + (f" of {row.total_steps}" if row.total_steps else "") if row.step else ""
    more = row.record.message or "; ".join(row.alarms)
    return row.record.state + far + (f": {more}" if more else "")


def cost_of(records: Sequence[Record]) -> str:
    """GPU-hours and CPU-hours that the records held."""
    hours = {unit: sum(record.hours for record in records if record.unit == unit) for unit in ("GPU", "CPU")}
    return ", ".join(f"{spent:.2f} {unit}-hours" for unit, spent in hours.items() if spent) or "nothing"
