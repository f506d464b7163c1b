"""A run in words: how far it is, and what became of it."""

from typing import Any

from dreambooth_moslora.disk import events
from dreambooth_moslora.training.explain import NOTHING, closing_advice
from dreambooth_moslora.training.figures import LEAST_LIKENESS, figures_from, known_config
from dreambooth_moslora.ui import html
from dreambooth_moslora.ui.events import sentence
from dreambooth_moslora.ui.jobs import JobState
from dreambooth_moslora.ui.train import train_form

LEARNED = "It learned your subject: likeness to the photos rose from {:.0%} to {:.0%}."
NOT_LEARNED = "It hardly learned your subject: likeness to the photos was {:.0%}, and is {:.0%}."
LOOK_YOURSELF = "Nothing was measured. Are the new pictures like your photos?"
"""Verdicts on a finished run; the first two with likeness before and now."""
PHASES = {
    "loading": "Loading the base",
    "captions": "Writing captions",
    "masks": "Making masks",
    "class_images": "Making class images",
    "caching": "Encoding the photos",
    "sampling": "Drawing samples",
    "evaluating": "Measuring fidelity",
    "exporting": "Writing the adapter and checking it",
}
"""Phase of the trainer -> what the page says of it."""
ENDINGS = {
    "done": "Done.",
    "interrupted": "Stopped; a checkpoint is written.",
    "failed": "The run failed.",
}
"""State of a run that has ended -> what the page says of it."""


def verdict_card(metrics: events.Metrics, has_best: bool) -> str:
    """What became of a finished run, in words, and what to do next.

    With `has_best` its best step was kept. Advice for the command line is said in the form's words.
    """
    figures = figures_from(metrics.events, known_config(metrics.last("start").get("config") or {}))
    # Did it learn the subject?
    before, now = (figures.scores.get(name) for name in ("dino_base", "dino"))
    if now is None or before is None:
        verdict = LOOK_YOURSELF
    else:
        said = LEARNED if now - before >= LEAST_LIKENESS else NOT_LEARNED
        verdict = said.format(max(before, 0), max(now, 0))
    lines = [verdict]
    best = metrics.last("evaluation").get("best")
    if has_best and isinstance(best, dict):
        lines.append(
            f"Step {best.get('step')} was the best: it is what you draw with and download."
        )
    # What next?
    advice = [line for line in closing_advice(figures) if line != NOTHING]
    for line in advice:
        lines.append(f"Try next: {train_form.in_the_forms_words(line)}.")
    if not advice:
        lines.append("Next: “Draw with it”, in places that the photos do not show.")
    return html.remarks_card(lines)


def status_card(state: JobState, metrics: events.Metrics) -> str:
    """One line of state and one of numbers."""
    # It has ended.
    if state.state in ENDINGS:
        detail = state.message or f"Step {state.step} of {state.max_train_steps}."
        # Stopped before the first step: there is no checkpoint.
        if state.state == "interrupted" and state.message:
            return html.notice(f"{sentence(state.message)}.", "good")
        kind = "bad" if state.state == "failed" else "good"
        return html.notice(f"{ENDINGS[state.state]} {detail}", kind)
    # It begins, or is about to end.
    if state.state == "starting":
        return html.progress_card("Starting …", "loading the libraries", 0.0)
    last = metrics.last("step")
    total = state.max_train_steps
    fraction = state.step / total if total else 0.0
    if state.state == "stopping":
        detail = "the step is finished and a checkpoint written"
        return html.progress_card("Stopping …", detail, fraction)
    # It trains.
    if state.phase in ("", "training") and last:
        line = f"Step {state.step} of {total}"
        return html.progress_card(line, numbers_of(last), fraction)
    if state.phase == "training":
        line = f"Step {state.step + 1} of {total} …"
        return html.progress_card(line, "the first takes longest", fraction)
    # It does something else, which may be counted.
    line = PHASES.get(state.phase, state.phase or "Preparing")
    phase = metrics.last("phase")
    if int(phase.get("total") or 1) > 1:
        line += f" {phase.get('done')} of {phase['total']}"
    return html.progress_card(f"{line} …", numbers_of(last), fraction)


def numbers_of(step: dict[str, Any]) -> str:
    """The numbers of a step's event, in one line; those that it has."""
    parts = []
    if step.get("eta_sec") is not None:
        parts.append(f"about {html.format_seconds(step['eta_sec'])} left")
    if step.get("memory_gib"):
        parts.append(f"{step['memory_gib']:.1f} GiB")
    if step.get("loss") is not None:
        parts.append(f"loss {step['loss']:.3f}")
    return " · ".join(parts)
