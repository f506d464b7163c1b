"""Write a comparison as files.

They are `publish.json`, `table.md` for a README, `report.html`, and its plots as PNG.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dreambooth_moslora import __version__
from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.disk.paths import get_public_name
from dreambooth_moslora.evaluation.metrics import Interval
from dreambooth_moslora.extras.lab import comparison, run
from dreambooth_moslora.extras.lab.study import Cell, Study
from dreambooth_moslora.pictures import render
from dreambooth_moslora.settings.metric_kinds import METRICS, Metric
from dreambooth_moslora.settings.setting_names import SETTINGS

WIN_COLOUR = "#2a6fdb"
TIE_COLOUR = "#c9c9cf"
LOSS_COLOUR = "#d9822b"
"""Colours of a bar's parts; the first is also that of the differences."""


def format_label(item: comparison.ArmSummary | comparison.Outcome) -> str:
    """Format an arm at a rank, for a plot."""
    return f"{item.arm}, r{item.rank}"


def plot_differences(outcomes: Sequence[comparison.Outcome], reference: str) -> Figure:
    """Paired differences to the reference with 95 % intervals, one panel per measure. An outcome
    without the measure, as one by references has no drift, is left out of the panel."""
    figure = Figure(figsize=(10, 1.2 + 0.32 * len(outcomes)), layout="constrained")
    panel_names = [name for name, row in METRICS.items() if row.panel]
    measures = [m for m in panel_names if any(m in outcome.differences for outcome in outcomes)]
    axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    rows = range(len(outcomes))[::-1]  # the first on top
    for axis, measure in zip(axes, measures):
        for row, outcome in zip(rows, outcomes):
            if measure in outcome.differences:
                difference = outcome.differences[measure]
                reach = np.array([difference.error_lengths]).T
                axis.errorbar(
                    [difference.mean], [row], xerr=reach, fmt="o", color=WIN_COLOUR, capsize=3
                )
        axis.axvline(0, color="#888", linewidth=1)
        axis.set(title=METRICS[measure].panel, xlabel=f"difference to {reference}")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(list(rows), [format_label(outcome) for outcome in outcomes])
    return figure


def plot_wins(outcomes: Sequence[comparison.Outcome], reference: str) -> Figure:
    """Fractions of pictures that win, tie and lose against the reference's, separately for subject
    and prompt."""
    figure = Figure(figsize=(10, 1.2 + 0.32 * len(outcomes)), layout="constrained")
    axes = figure.subplots(1, len(outcomes[0].wins), sharey=True, squeeze=False)[0]
    rows = range(len(outcomes))[::-1]
    for axis, measure in zip(axes, outcomes[0].wins):
        # three parts of a bar, each beginning where the one before ends
        bar_starts = [0.0] * len(outcomes)
        for part, (name, colour) in enumerate(
            (("win", WIN_COLOUR), ("tie", TIE_COLOUR), ("loss", LOSS_COLOUR))
        ):
            width = [100 * outcome.wins[measure][part] for outcome in outcomes]
            axis.barh(list(rows), width, left=bar_starts, color=colour, label=name)
            bar_starts = [a + b for a, b in zip(bar_starts, width)]
        axis.set(title=f"{METRICS[measure].panel}: % against {reference}", xlim=(0, 100))
    axes[0].set_yticks(list(rows), [format_label(outcome) for outcome in outcomes])
    axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def write_comparison(study: Study, results: Sequence[comparison.CellResult], out: Path) -> str:
    """Write all files for the finished cells; returns the findings, one sentence per arm."""
    # the numbers
    results = comparison.filter_whole_seeds(results)
    arms = comparison.summarize_arms(results)
    against = comparison.compare_arms(study, results)
    verdicts = comparison.compare_references(study, results)
    out.mkdir(parents=True, exist_ok=True)
    facts = build_results_json(study, results, arms, against)
    facts["by_references"] = {name: asdict(verdict) for name, verdict in verdicts.items()}
    write_atomic(out / "results.json", json.dumps(facts, indent=1) + "\n")

    # the tables
    tables = [build_arm_rows(arms), build_relative_rows(arms), build_outcome_rows(against)]
    parts = []
    for header, rows in tables:
        lines = [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]]
        parts.append("\n".join(lines))
    write_atomic(out / "table.md", "\n\n".join(parts) + "\n")

    # the plots, of what there is so far
    plots = {}
    if against:
        plots["differences"] = plot_differences(against, study.reference)
        plots["wins"] = plot_wins(against, study.reference)
    for name, plot in plots.items():
        plot.savefig(out / f"{name}.png", dpi=110)

    # the findings, and whether training was worth it
    finding_lines = [format_finding(study, against)]
    finding_lines += [f"{name}: {verdict}" for name, verdict in verdicts.items()]
    findings = "\n".join(finding_lines)

    # the report with all of it, and the pictures
    page = render_page(study, results, out, tables=tables, plots=plots, findings=findings)
    write_atomic(out / "report.html", page)
    return findings


PATH_SETTINGS = {name for name, row in SETTINGS.items() if row.metadata["path"]}
"""Settings with paths of the machine."""


def build_results_json(
    study: Study,
    results,
    arms: Sequence[comparison.ArmSummary],
    against: Sequence[comparison.Outcome],
) -> dict:
    """Settings without paths, every cell, every arm, every difference."""
    # how it was done; the order of the names is the file's
    protocol = study.protocol
    judges = {"clip": get_public_name(protocol.clip), "dino": get_public_name(protocol.dino)}
    facts = {
        "subjects": [subject.name for subject in study.subjects],
        "tuning_subjects": [subject.name for subject in study.tuning_subjects],
        "seeds": comparison.list_seeds(results),
        "ranks": study.ranks,
        "learning_rates": study.learning_rates,
        "budget": study.budget,
        "reference": study.reference,
        "tie": study.tie,
        "evaluation": asdict(protocol) | judges,
        "train": {name: value for name, value in study.train.items() if name not in PATH_SETTINGS},
        "arms": study.arms,
    }

    return {
        "format": 1,
        "version": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "study": facts,
        "arms": [asdict(arm) for arm in arms],
        "against_reference": [asdict(outcome) for outcome in against],
        "cells": [{**asdict(r.cell), "scores": r.scores, "cost": r.cost} for r in results],
    }


def build_arm_rows(arms: Sequence[comparison.ArmSummary]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: scores with intervals over subjects and seeds, and the cost of each arm."""
    jobs = max((int(arm.cost.get("jobs", 1)) for arm in arms), default=1)
    pace = "ms a step" if jobs == 1 else f"ms a step, {jobs} trainings at once"
    names = list_measured(
        [arm.scores for arm in arms], lambda row: row.study in ("scores", "differences")
    )
    header = ["Arm", "Rank", "Parameters in the UNet", "Learning rate"]
    header += [format_column(name) for name in names]
    header += [pace, "GiB of the process"]
    rows = []
    for arm in sorted(arms, key=lambda arm: arm.rank):
        # the nominal rank, and the real one in brackets where the budget chose another
        rank = f"{arm.rank}"
        if arm.cost["rank"] != arm.rank:
            rank += f" ({arm.cost['rank']:.0f})"
        row = [arm.arm, rank, f"{arm.cost['parameters']:,.0f}", f"{arm.learning_rate:g}"]
        row += format_intervals(arm.scores, names)
        row += [f"{1000 * arm.cost['step_sec']:.0f}", f"{arm.cost['memory_gib']:.2f}"]
        rows.append(row)
    return header, rows


def build_relative_rows(arms: Sequence[comparison.ArmSummary]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the scores relative to their scales, where measured."""
    names = list_measured([arm.scores for arm in arms], lambda row: row.kind == "share")
    rows = []
    for arm in sorted(arms, key=lambda arm: arm.rank):
        rows.append([arm.arm, str(arm.rank), *format_intervals(arm.scores, names)])
    return ["Arm", "Rank", *(format_column(name) for name in names)], rows


def build_outcome_rows(against: Sequence[comparison.Outcome]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: paired differences, and win/tie/loss in % by subject and by prompt."""
    names = list_measured(
        [outcome.differences for outcome in against], lambda row: row.study == "differences"
    )
    judges = [
        f"{METRICS[name].curve.capitalize()} W/T/L %" for name in comparison.list_image_measures()
    ]
    header = ["Arm", "Rank", *(f"Δ {format_column(name)}" for name in names), *judges]
    rows = []
    for outcome in sorted(against, key=lambda item: item.rank):
        wins = []
        for name in comparison.list_image_measures():
            wins.append(" / ".join(f"{100 * share:.0f}" for share in outcome.wins[name]))
        rows.append(
            [
                outcome.arm,
                str(outcome.rank),
                *format_intervals(outcome.differences, names, "+"),
                *wins,
            ]
        )
    return header, rows


def list_measured(
    score_sets: Sequence[Mapping[str, Interval]], is_shown: Callable[[Metric], bool]
) -> list[str]:
    """List the measures to show in which any of the arms was measured; all of them without an
    arm."""
    names = [name for name, row in METRICS.items() if is_shown(row)]
    return [
        name for name in names if not score_sets or any(name in scores for scores in score_sets)
    ]


def format_column(name: str) -> str:
    """Format the header of a measure."""
    return METRICS[name].column or METRICS[name].title


def format_intervals(
    intervals: Mapping[str, Interval], names: Iterable[str], sign: str = ""
) -> list[str]:
    """Format the cells of these measures; empty where one was not measured."""
    return [format(intervals[name], sign) if name in intervals else "" for name in names]


def format_finding(study: Study, against: Sequence[comparison.Outcome]) -> str:
    """Format the differences in score, without adjectives: an interval excludes zero, or it does
    not."""
    if not against:
        return f"nothing to compare yet: {study.reference} and one other arm must be complete."
    lines = []
    for outcome in against:
        change = outcome.differences["score"]
        if change.low is None:
            verdict = "nothing shown, as one subject at one seed has no interval"
        elif change.low > 0:
            verdict = "better"
        elif change.high < 0:
            verdict = "worse"
        else:
            verdict = "no difference shown"
        lines.append(
            f"{outcome.arm} r{outcome.rank} against {study.reference}: score {change:+}, {verdict}"
        )

    # with many comparisons some look like a difference
    count = len(against)
    lines.append(
        f"{count} comparisons at 95 %: "
        f"about {0.05 * count:.1f} of them would exclude zero by chance alone."
    )
    return "\n".join(lines)


def render_page(study: Study, results, out: Path, tables, plots: dict, findings: str) -> str:
    """Render the report as a page.

    study: what was compared
    results: all that counts
    out: the folder of the results, with their pictures
    tables: header and rows of arms, of shares, and of differences
    plots: by name
    findings: a line each
    """
    arms, shares, differences = tables
    protocol = study.protocol

    # how it was done, in one sentence
    seeds = len(comparison.list_seeds(results))
    ranks = ", ".join(str(rank) for rank in study.ranks)
    rates = ", ".join(f"{rate:g}" for rate in study.learning_rates)
    protocol_line = (
        f"{len(results)} trainings: "
        f"{len(study.subjects)} subjects × {seeds} seeds × ranks {ranks}; "
        f"learning rate chosen for each arm and rank out of {rates} "
        f"on {len(study.tuning_subjects)} other subjects; "
        f"equal {study.budget}, steps of a subject, data order and noise; "
        f"{protocol.num_prompts} prompts × {protocol.images_per_prompt} pictures."
    )
    return render(
        "study.html",
        title="Comparison of adapters",
        protocol=protocol_line,
        findings=findings.splitlines(),
        arms=arms,
        shares=shares,
        differences=differences,
        reference=study.reference,
        plots=plots,
        strips=iterate_strips(study, results, out),
    )


def iterate_strips(
    study: Study, results: Sequence[comparison.CellResult], out: Path
) -> Iterator[tuple[str, Image.Image]]:
    """Yield a title and the strip of pictures of each cell that the report shows."""
    for subject in study.subjects:
        for cell in list_first_cells(study, results, subject.name):
            path = run.get_result_path(study, cell, out).with_suffix(".jpg")
            if path.is_file():
                yield f"{cell.subject}: {cell.arm}, rank {cell.rank}", Image.open(path)


def list_first_cells(
    study: Study, results: Sequence[comparison.CellResult], subject: str
) -> list[Cell]:
    """List the cells of one subject in the comparison, at the first seed; the lowest rank first."""
    first_cells = [
        r.cell for r in results if (r.cell.stage, r.cell.seed) == ("test", study.seeds[0])
    ]
    return sorted(
        (cell for cell in first_cells if cell.subject == subject), key=lambda cell: cell.rank
    )
