"""The loss curve of a run as a picture. Single steps are noisy (each draws its own noise level): a mean runs along."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

__all__ = ["draw_loss_plot", "running_mean"]

COLOURS = {"loss_instance": "#2a6fdb", "loss_prior": "#d9822b"}
LABELS = {"loss_instance": "instance", "loss_prior": "prior"}


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each place (fewer at the start); the length stays."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_loss_plot(steps: list[dict], path: Path) -> None:
    """`steps` are the step events of `metrics.jsonl`. Writes a PNG."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for key, colour in COLOURS.items():
        points = [(event["step"], event[key]) for event in steps if event.get(key) is not None]
        if points:
            at, values = map(np.array, zip(*points))
            axes.plot(at, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(at, running_mean(values, max(5, len(values) // 20)), color=colour, label=LABELS[key])
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
