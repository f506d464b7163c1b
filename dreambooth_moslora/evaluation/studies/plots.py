"""The figures of a comparison: differences, wins, fidelity against prompt, and learning-rate curves."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from dreambooth_moslora.evaluation.studies.stats import ArmSummary, Outcome

__all__ = ["difference_plot", "rate_plot", "trade_off_plot", "win_plot"]

SHOWN = {"dino": "subject (DINO)", "clip_t": "prompt (CLIP-T)", "score": "score"}
WIN, TIE, LOSS = "#2a6fdb", "#c9c9cf", "#d9822b"


def label(item: ArmSummary | Outcome) -> str:
    return f"{item.arm}, r{item.rank}"


def difference_plot(outcomes: Sequence[Outcome], reference: str) -> Figure:
    """Paired differences to the reference with 95 % intervals, one panel per measure."""
    figure = Figure(figsize=(10, 1.2 + 0.32 * len(outcomes)), layout="constrained")
    axes = figure.subplots(1, len(SHOWN), sharey=True)
    rows = range(len(outcomes))[::-1]
    for axis, (measure, title) in zip(axes, SHOWN.items()):
        found = [outcome.differences[measure] for outcome in outcomes]
        means = [interval.mean for interval in found]
        reach = [[i.mean - i.low for i in found], [i.high - i.mean for i in found]]
        axis.errorbar(means, list(rows), xerr=reach, fmt="o", color=WIN, capsize=3)
        axis.axvline(0, color="#888", linewidth=1)
        axis.set(title=title, xlabel=f"difference to {reference}")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(list(rows), [label(outcome) for outcome in outcomes])
    return figure


def win_plot(outcomes: Sequence[Outcome], reference: str) -> Figure:
    """Fractions of pictures that win, tie and lose against the reference's, separately for subject and prompt."""
    figure = Figure(figsize=(10, 1.2 + 0.32 * len(outcomes)), layout="constrained")
    measures = [m for m in SHOWN if m in outcomes[0].wins]
    axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    rows = range(len(outcomes))[::-1]
    for axis, measure in zip(axes, measures):
        left = [0.0] * len(outcomes)
        for part, (name, colour) in enumerate((("win", WIN), ("tie", TIE), ("loss", LOSS))):
            width = [100 * outcome.wins[measure][part] for outcome in outcomes]
            axis.barh(list(rows), width, left=left, color=colour, label=name)
            left = [a + b for a, b in zip(left, width)]
        axis.set(title=f"{SHOWN[measure]}: % against {reference}", xlim=(0, 100))
    axes[0].set_yticks(list(rows), [label(outcome) for outcome in outcomes])
    axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def trade_off_plot(arms: Sequence[ArmSummary]) -> Figure:
    """Subject fidelity against prompt fidelity; up and to the right is better."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
    for arm in arms:
        x, y = arm.scores["clip_t"], arm.scores["dino"]
        reach = {"xerr": [[x.mean - x.low], [x.high - x.mean]], "yerr": [[y.mean - y.low], [y.high - y.mean]]}
        axis.errorbar(x.mean, y.mean, **reach, fmt="o", capsize=2, alpha=0.8, label=label(arm))
    axis.set(xlabel="prompt fidelity, CLIP-T", ylabel="subject fidelity, DINO")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def rate_plot(curves: dict[tuple[str, int], dict[float, float]]) -> Figure:
    """Score on the tuning subjects by learning rate, one panel per rank."""
    ranks = sorted({rank for _, rank in curves})
    figure = Figure(figsize=(5 * len(ranks), 3.6), layout="constrained")
    for axis, rank in zip(figure.subplots(1, len(ranks), sharey=True, squeeze=False)[0], ranks):
        for (arm, own), curve in curves.items():
            if own == rank:
                rates = sorted(curve)
                axis.plot(rates, [curve[rate] for rate in rates], "o-", label=arm)
        axis.set(title=f"rank {rank}", xscale="log", xlabel="learning rate", ylabel="score on the tuning subjects")
        axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize="small")
    return figure
