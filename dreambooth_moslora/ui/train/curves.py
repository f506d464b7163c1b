"""Curves of a run while it trains, as gradio draws them: losses and scores."""

from typing import Any

import gradio as gr
import pandas as pd

from dreambooth_moslora.disk import events
from dreambooth_moslora.settings.metric_kinds import METRICS, describe_scores
from dreambooth_moslora.ui import html
from dreambooth_moslora.values import is_finite_number

LOSS_LABELS = {"loss_instance": "photos", "loss_prior": "class"}
"""Field of a step's event -> label of its curve."""
MAX_POINTS = 60
"""Points of a curve of losses; each is the mean of several steps."""
COLORS = ("#0d9488", "#d97706", "#8b5cf6", "#e11d48", "#3b82f6", "#65a30d", "#db2777", "#78716c")
"""Colours that stand out on white and on black."""
SCORE_COLORS = dict(zip((row.phrase for row in METRICS.values() if row.phrase), COLORS))
"""Phrase of a metric -> colour of its curve."""


def build_curve_widgets() -> dict[str, Any]:
    """Build the plots, hidden until there is something to draw, and the scores in words."""
    widgets: dict[str, Any] = {"scores": gr.HTML("", elem_id="scores_now", label="Scores")}
    look = {"x": "step", "y": "value", "color": "curve", "visible": False}
    look |= {"y_title": " ", "color_title": " ", "x_title": "step", "min_width": 260}
    with gr.Row(elem_id="curves"):
        widgets["loss_curve"] = gr.LinePlot(label="Loss", elem_id="loss_curve", **look)
        # The scores in words, above, are the legend.
        look |= {"y_axis_format": "%", "colors_in_legend": []}
        widgets["score_curve"] = gr.LinePlot(label="Scores", elem_id="score_curve", **look)
    return widgets


def list_curve_values(metrics: events.EventLog, best_step: int | None = None) -> dict[str, Any]:
    """Return new values of the widgets, by name: the scores of `best_step`, or the latest."""
    losses = build_loss_table(metrics)
    evaluations = events.filter_events(events.StepEvaluated, metrics.events)
    scores = build_score_table(evaluations)
    chosen_evaluations = [event for event in evaluations if event.step == best_step] or evaluations
    texts = describe_scores(chosen_evaluations[-1].scores) if chosen_evaluations else {}
    legend = [(SCORE_COLORS[METRICS[name].phrase], text) for name, text in texts.items()]
    title = f"Step {chosen_evaluations[-1].step}:" if texts else ""
    return {
        "scores": html.render_legend(title, legend),
        "loss_curve": build_plot(losses, dict(zip(LOSS_LABELS.values(), COLORS))),
        "score_curve": build_plot(scores, SCORE_COLORS),
    }


def build_loss_table(metrics: events.EventLog) -> pd.DataFrame:
    """Return the mean of each loss over equal parts of the run, at the last step of each part."""
    rows = [
        (event.get("step", 0), label, event[key])
        for event in metrics.list_events("step")
        for key, label in LOSS_LABELS.items()
        if is_finite_number(event.get(key))
    ]
    table = pd.DataFrame(rows, columns=["step", "curve", "value"])
    last_step = max((step for step, *_ in rows), default=0)
    steps_a_point = last_step // MAX_POINTS + 1
    table["step"] = (-(-table["step"] // steps_a_point) * steps_a_point).clip(upper=last_step)
    return table.groupby(["curve", "step"], as_index=False)["value"].mean()


def build_score_table(evaluations: list[events.StepEvaluated]) -> pd.DataFrame:
    """Return the scores that are told of a run, at each step that was scored."""
    rows = [
        (event.step, METRICS[name].phrase, event.scores[name])
        for event in evaluations
        for name in describe_scores(event.scores)
    ]
    return pd.DataFrame(rows, columns=["step", "curve", "value"])


def build_plot(table: pd.DataFrame, colors: dict[str, str]) -> gr.LinePlot:
    """Return the plot with this table; it is hidden with less than two points of a curve."""
    names = list(dict.fromkeys(table["curve"]))
    # The plot takes new curves over only with new colours.
    shown_colors = {name: colors[name] for name in names}
    return gr.LinePlot(table, color_map=shown_colors, visible=table["step"].nunique() > 1)
