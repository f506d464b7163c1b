"""Plots of a run's losses and scores."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dreambooth_moslora.disk import events
from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.settings import metric_kinds

LOSS_CURVES = {"loss_instance": ("#2a6fdb", "instance"), "loss_prior": ("#d9822b", "prior")}


def compute_running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each position (fewer at the start); same length as
    `values`."""
    ends = np.arange(1, len(values) + 1)
    return np.array([values[max(0, end - window) : end].mean() for end in ends])


def plot_losses(
    steps: Sequence[events.StepDone], path: Path, evaluations: Sequence[events.StepEvaluated] = ()
) -> None:
    """Write a PNG with the loss and its running mean, and with the scores if there are
    evaluations."""
    panels = 2 if evaluations else 1
    figure = Figure(figsize=(7, 3.5 * panels), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]

    # The losses. Single steps vary so much that only the mean shows where they go.
    for key, (colour, label) in LOSS_CURVES.items():
        logged = [event for event in steps if getattr(event, key) is not None]
        if not logged:
            continue
        at = np.array([event.step for event in logged])
        values = np.array([getattr(event, key) for event in logged])
        mean = compute_running_mean(values, max(5, len(values) // 20))
        axes[0].plot(at, values, color=colour, alpha=0.25, linewidth=0.8)
        axes[0].plot(at, mean, color=colour, label=label)
    axes[0].set(xlabel="step", ylabel="loss", ylim=(0, None))
    if axes[0].get_legend_handles_labels()[1]:
        axes[0].legend(frameon=False)

    # The scores below them.
    if evaluations:
        plot_scores(axes[1], evaluations)
    for panel in axes:
        panel.grid(alpha=0.3)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(path, buffer.getvalue())


def plot_scores(axes: Axes, evaluations: Sequence[events.StepEvaluated]) -> None:
    """Draw likeness, prompt, copies and score; a line marks the best step."""
    at = [event.step for event in evaluations]
    for key, row in metric_kinds.METRICS.items():
        values = [event.scores.get(key, np.nan) for event in evaluations]
        if row.curve and np.isfinite(values).any():
            # Without copies, the score may be the subject's likeness: it lies wide beneath.
            style = {"linewidth": 6, "alpha": 0.4, "zorder": 1} if key == "score" else {}
            axes.plot(
                at, values, "o-", **{"markersize": 3, "linewidth": 1} | style, label=row.curve
            )
    if best := evaluations[-1].best:
        label = f"best: step {best['step']}"
        axes.axvline(best["step"], color="#888", linestyle=":", label=label)
    axes.set(xlabel="step", ylabel="score")
    # Below the curves, which would hide it.
    beneath = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 3}
    axes.legend(frameon=False, fontsize="small", **beneath)
