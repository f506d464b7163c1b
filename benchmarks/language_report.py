"""The tables of `benchmarks.language`: accuracy by arm and task, and each arm's paired difference to LoRA.

Arms share A's start, examples and tests, so a difference is taken cell by cell. Its 95 % interval resamples tasks
and seeds (`intervals`). Only seeds that are whole count: every arm on every task.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dreambooth_moslora.core import atomic_write
from dreambooth_moslora.evaluation.metrics import bootstrap_mean

__all__ = ["Cell", "accuracies", "differences", "write_report"]

REFERENCE = "LoRA"
Bounds = Mapping[str, Mapping[str, float]]  # name of a row -> task -> accuracy
Curve = Mapping[float, float]  # learning rate -> mean accuracy on the tuning tasks


@dataclass(frozen=True)
class Cell:
    """One adaptation: `accuracy` of 0 to 1, trained `parameters`, `seconds` of the processor."""

    arm: str
    task: str
    seed: int
    rate: float
    accuracy: float
    parameters: int
    seconds: float


def whole_seeds(cells: Sequence[Cell]) -> list[int]:
    """Seeds for which every arm has every task."""
    wanted = {(arm, task) for arm in {c.arm for c in cells} for task in {c.task for c in cells}}
    seeds = sorted({cell.seed for cell in cells})
    return [seed for seed in seeds if {(c.arm, c.task) for c in cells if c.seed == seed} == wanted]


def accuracies(cells: Sequence[Cell]) -> dict[str, np.ndarray]:
    """Arm -> table (tasks, seeds) of accuracies, tasks in the order of the cells."""
    seeds, found = whole_seeds(cells), {(c.arm, c.task, c.seed): c.accuracy for c in cells}
    arms, tasks = dict.fromkeys(c.arm for c in cells), dict.fromkeys(c.task for c in cells)
    return {arm: np.array([[found[arm, task, seed] for seed in seeds] for task in tasks]) for arm in arms}


def differences(tables: Mapping[str, np.ndarray]) -> dict[str, dict[str, dict[str, float]]]:
    """Arm -> the mean paired difference to LoRA, its interval over tasks and seeds, and that over tasks alone.

    The second takes each task's mean as one number, whose spread already holds that of its seeds.
    """
    found = {}
    for arm, table in tables.items():
        if arm != REFERENCE:
            pairs = table - tables[REFERENCE]
            both, tasks = bootstrap_mean(pairs), bootstrap_mean(pairs.mean(axis=1))
            found[arm] = {"tasks and seeds": both.to_dict(), "tasks": tasks.to_dict()}
    return found


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"


def accuracy_table(bounds: Bounds, cells: Sequence[Cell], tables: Mapping[str, np.ndarray]) -> str:
    """Arms × tasks, and the average: mean accuracies in percent."""
    first = {cell.arm: cell for cell in reversed(cells)}
    rows = []
    for name, row in bounds.items():
        values = list(row.values())
        rows.append([name, "", "", *map(percent, values), percent(np.mean(values))])
    for arm, table in tables.items():
        means = [percent(mean) for mean in table.mean(axis=1)]
        rows.append([arm, f"{first[arm].parameters:,}", f"{first[arm].rate:.3g}", *means, percent(table.mean())])
    return markdown(["arm", "parameters", "rate", *dict.fromkeys(cell.task for cell in cells), "average"], rows)


def difference_table(found: Mapping[str, dict[str, dict[str, float]]]) -> str:
    rows = []
    for arm, row in found.items():
        both, tasks = row["tasks and seeds"], row["tasks"]
        ends = [(i["low"], i["high"]) for i in (both, tasks)]
        spans = ["none" if low is None else f"{100 * low:+.1f} to {100 * high:+.1f}" for low, high in ends]
        rows.append([arm, f"{100 * both['mean']:+.1f}", *spans])
    return markdown([f"arm, minus {REFERENCE}", "difference, points", "95 %, tasks and seeds", "95 %, tasks"], rows)


def rate_table(curves: Mapping[str, Curve]) -> str:
    """The mean accuracy on the tuning tasks at every rate that was tried."""
    rows = []
    for arm, curve in curves.items():
        best = max(curve, key=curve.get)
        rows.append([arm, f"{best:.3g}", ", ".join(f"{rate:.3g}: {percent(mean)}" for rate, mean in curve.items())])
    return markdown(["arm", "chosen", "rate: mean accuracy on the tuning tasks"], rows)


def write_report(out: Path, facts: dict, bounds: Bounds, curves: Mapping[str, Curve], cells: Sequence[Cell]) -> str:
    """Writes `table.md` and `results.json` into `out`; returns the tables. Says so when no seed is whole.

    `bounds` are rows that are not compared: the frozen base and the training of all weights.
    """
    seeds = whole_seeds(cells)
    if not seeds:
        return "no seed is whole yet: every arm on every task; give the command again"
    tables = accuracies(cells)
    found = differences(tables) if REFERENCE in tables else {}
    heading = (
        f"Rank {facts['rank']}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}, exact-match accuracy in percent.\n"
    )
    text = "\n".join([heading, accuracy_table(bounds, cells, tables), difference_table(found), rate_table(curves)])
    results = {
        **facts,
        "seeds": seeds,
        "bounds": bounds,
        "rates": curves,
        "seconds": {arm: float(np.mean([c.seconds for c in cells if c.arm == arm]).round(2)) for arm in tables},
        "accuracies": {arm: table.round(4).tolist() for arm, table in tables.items()},
        "differences": found,
    }
    atomic_write(out / "table.md", text)
    atomic_write(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return text
