"""A run in words: how far it is, and what became of it."""

from pathlib import Path
from typing import Any

from dreambooth_moslora.disk import events
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.settings.prompts import trigger_words
from dreambooth_moslora.settings.subject_kinds import kind_of
from dreambooth_moslora.training.run_advice import NOT_SCORED, NOTHING, closing_advice, is_short
from dreambooth_moslora.training.run_metrics import LEAST_LIKENESS, figures_from, known_config
from dreambooth_moslora.ui import html
from dreambooth_moslora.ui.events import sentence
from dreambooth_moslora.ui.jobs import JobState
from dreambooth_moslora.ui.photo_copies import kept_photos
from dreambooth_moslora.ui.train import train_form

BEGUN = "It has begun to learn your subject: likeness to the photos rose from {:.0%} to {:.0%}."
LEARNED = "It learned your subject: likeness to the photos rose from {:.0%} to {:.0%}."
NOT_LEARNED = "It hardly learned your subject: likeness to the photos was {:.0%}, and is {:.0%}."
LOOK_YOURSELF = "Nothing was measured. Are the new pictures like your photos?"
"""Verdicts on a finished run; the first three with likeness before and now."""
IN_COMFYUI = (
    "For ComfyUI: put the file into its folder models/loras, choose it in a LoRA loader, "
    "and write {} in the prompt."
)
"""Where the downloaded file goes, with the words of the subject."""
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


def verdict_card(metrics: events.Metrics, run_dir: Path, has_best: bool) -> str:
    """What became of a finished run, in words, and what to do next.

    In `run_dir` are the page's copies of its photos. With `has_best` its best step was kept. Advice
    for the command line is said in the form's words.
    """
    config = known_config(metrics.last("start").get("config") or {})
    photos = kept_photos(RunDir(run_dir).photos_dir)
    figures = figures_from(metrics.events, config, {"count": len(photos)})
    # Did it learn the subject?
    before, now = (figures.scores.get(name) for name in ("dino_base", "dino"))
    name = "“{}”"
    if kind_of(config).is_style:  # of which the base has none
        before, now = 0.0, figures.scores.get("style")
        now = None if now is None else min(now, 1.0)  # above 1 it is as like as 1
        name = "“in {} style”"
    if now is None or before is None:
        verdict = LOOK_YOURSELF
    else:
        learned = BEGUN if is_short(figures) else LEARNED
        said = learned if now - before >= LEAST_LIKENESS else NOT_LEARNED
        verdict = said.format(max(before, 0), max(now, 0))
    lines = [verdict]
    best = metrics.last("evaluation").get("best")
    if has_best and isinstance(best, dict):
        lines.append(
            f"Step {best.get('step')} was the best: it is what you draw with and download."
        )
    # What next? That nothing was scored is said already.
    known = (NOTHING, NOT_SCORED)
    advice = [line for line in closing_advice(figures) if not line.startswith(known)]
    for line in advice:
        lines.append(f"Next: {train_form.in_the_forms_words(line)}.")
    if not advice:
        lines.append("Next: “Draw with it”, in places that the photos do not show.")
    words = " and ".join(map(name.format, trigger_words(config)))
    if words:
        lines.append(IN_COMFYUI.format(words))
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
        return html.progress_card(line, numbers_of(last, has_time=True), fraction)
    if state.phase == "training":
        line = f"Step {state.step + 1} of {total} …"
        return html.progress_card(line, "the first takes longest", fraction)
    # It does something else, which may be counted: the time that is left is of the steps alone.
    line = PHASES.get(state.phase, state.phase or "Preparing")
    phase = metrics.last("phase")
    if int(phase.get("total") or 1) > 1:
        line += f" {phase.get('done')} of {phase['total']}"
    return html.progress_card(f"{line} …", numbers_of(last), fraction)


def numbers_of(step: dict[str, Any], *, has_time: bool = False) -> str:
    """The numbers of a step's event, in one line; those that it has, with `has_time` the time that
    is left as well."""
    parts = []
    if has_time and step.get("eta_sec") is not None:
        parts.append(f"about {html.format_seconds(step['eta_sec'])} left")
    if step.get("memory_gib"):
        parts.append(f"{step['memory_gib']:.1f} GiB")
    if step.get("loss") is not None:
        parts.append(f"loss {step['loss']:.3f}")
    return " · ".join(parts)
