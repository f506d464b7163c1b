"""Draws the loss of a run, and its scores beside it.

The loss of single steps is noisy, as each draws its own noise levels, so a running mean is drawn over it.
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dreambooth_moslora.core.atomic_files import atomic_write
from dreambooth_moslora.core.run_files.events import StepDone, StepEvaluated
from dreambooth_moslora.training.results.best_step import CURVES

__all__ = ["draw_loss_plot", "running_mean"]

COLOURS = {"loss_instance": "#2a6fdb", "loss_prior": "#d9822b"}
LABELS = {"loss_instance": "instance", "loss_prior": "prior"}


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each position (fewer at the start); same length as `values`."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_loss_plot(steps: Sequence[StepDone], path: Path, evaluations: Sequence[StepEvaluated] = ()) -> None:
    """Write a PNG with the loss, and with the scores if there are evaluations."""
    panels = 2 if evaluations else 1
    figure = Figure(figsize=(7 * panels, 3.5), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    draw_loss(axes[0], steps)
    if evaluations:
        draw_fidelity(axes[1], evaluations)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    atomic_write(path, buffer.getvalue())


def draw_fidelity(axes: Axes, evaluations: Sequence[StepEvaluated]) -> None:
    """Draw likeness, prompt, copies and score; a line marks the best step."""
    at = [event.step for event in evaluations]
    for key, label in CURVES.items():
        values = [event.scores.get(key, np.nan) for event in evaluations]
        axes.plot(at, values, "o-", markersize=3, linewidth=2 if key == "score" else 1, label=label)
    best = max(evaluations, key=lambda event: (event.scores.get("score", 0.0), -event.step))
    axes.axvline(best.step, color="#888", linestyle=":", label=f"best: step {best.step}")
    axes.set(xlabel="step", ylabel="score")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")


def draw_loss(axes: Axes, steps: Sequence[StepDone]) -> None:
    for key, colour in COLOURS.items():
        points = [(event.step, getattr(event, key)) for event in steps if getattr(event, key) is not None]
        if points:
            at, values = map(np.array, zip(*points))
            axes.plot(at, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(at, running_mean(values, max(5, len(values) // 20)), color=colour, label=LABELS[key])
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
