"""Cards of a run: its progress, and the verdict at its end."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dreambooth_moslora.disk import events
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.settings.prompts import list_trigger_words
from dreambooth_moslora.settings.subject_kinds import get_subject_kind
from dreambooth_moslora.training.run_advice import (
    NO_ADVICE,
    judge_run,
    list_closing_advice,
)
from dreambooth_moslora.training.run_metrics import build_run_metrics, parse_known_config
from dreambooth_moslora.ui import html
from dreambooth_moslora.ui.events import format_message
from dreambooth_moslora.ui.jobs import JobState
from dreambooth_moslora.ui.photo_copies import list_photo_copies
from dreambooth_moslora.ui.train import train_form

COMFYUI_HINT = (
    "For ComfyUI: put the file into its folder models/loras, choose it in a LoRA loader, "
    "and write {} in the prompt."
)
"""Use of the downloaded file, with the subject's trigger words."""
PHASE_TITLES = {
    "loading": "Loading the base",
    "captions": "Writing captions",
    "masks": "Making masks",
    "class_images": "Making class images",
    "caching": "Encoding the photos",
    "sampling": "Drawing samples",
    "evaluating": "Measuring fidelity",
    "exporting": "Writing the adapter and checking it",
}
"""Phase of the trainer -> the page's text."""
ENDING_SENTENCES = {
    "done": "Done.",
    "interrupted": "Stopped; a checkpoint is written.",
    "failed": "The run failed.",
}
"""State of a run that has ended -> the page's text."""


def render_verdict(metrics: events.EventLog, run_dir: Path, best_step: int | None = None) -> str:
    """Render a finished run's result and what to do next.

    The folder `run_dir` has the page's copies of its photos. `best_step` is that of the best
    adapter, if one was stored. Flags in advice are replaced by the form's labels.
    """
    config = parse_known_config(metrics.get_last("start").get("config") or {})
    photos = list_photo_copies(RunDir(run_dir).photos_dir)
    # What came after the best step is of another adapter than the one that is shown.
    records = metrics.events
    if best_step is not None:
        kind = events.StepEvaluated.kind
        records = [
            event for event in records if event["type"] != kind or event.get("step", 0) <= best_step
        ]
    run_metrics = build_run_metrics(records, config, {"count": len(photos)})
    run_metrics = replace(run_metrics, folder=run_dir)
    lines = [train_form.replace_flags(judge_run(run_metrics))]
    if best_step is not None:
        lines.append(
            f"Step {best_step} was the best: it is shown here, and what you draw with and download."
        )
    # The next action.
    advice = [line for line in list_closing_advice(run_metrics) if line != NO_ADVICE]
    for line in advice:
        lines.append(f"Next: {train_form.replace_flags(line)}.")
    if not advice:
        lines.append("Next: “Draw with it”, in places that the photos do not show.")
    prompt_template = "“in {} style”" if get_subject_kind(config).is_style else "“{}”"
    trigger_words = " and ".join(map(prompt_template.format, list_trigger_words(config)))
    if trigger_words:
        lines.append(COMFYUI_HINT.format(trigger_words))
    return html.render_remarks(lines)


def render_status(state: JobState, metrics: events.EventLog) -> str:
    """Render a line of state and a line of numbers."""
    # A run that has ended.
    if state.state in ENDING_SENTENCES:
        detail = state.message or f"Step {state.step} of {state.max_train_steps}."
        # Stopped before the first step: there is no checkpoint.
        if state.state == "interrupted" and state.message:
            return html.render_notice(f"{format_message(state.message)}.", "good")
        kind = "bad" if state.state == "failed" else "good"
        return html.render_notice(f"{ENDING_SENTENCES[state.state]} {detail}", kind)
    # A run that begins, or is about to end.
    if state.state == "starting":
        return html.render_progress("Starting …", "loading the libraries", 0.0)
    last = metrics.get_last("step")
    total = state.max_train_steps
    fraction = state.step / total if total else 0.0
    if state.state == "stopping":
        detail = "the step is finished and a checkpoint written"
        return html.render_progress("Stopping …", detail, fraction)
    # A run that trains.
    if state.phase in ("", "training") and last:
        line = f"Step {state.step} of {total}"
        return html.render_progress(line, format_numbers(last, has_time=True), fraction)
    if state.phase == "training":
        line = f"Step {state.step + 1} of {total} …"
        return html.render_progress(line, "the first takes longest", fraction)
    # Another phase, which may be counted. The time left is not shown: it is that of the steps.
    line = PHASE_TITLES.get(state.phase, state.phase or "Preparing")
    phase = metrics.get_last("phase")
    if int(phase.get("total") or 1) > 1:
        done = int(phase.get("done") or 0)
        line += f" {done} of {phase['total']}"
        fraction = done / phase["total"]
    return html.render_progress(f"{line} …", format_numbers(last), fraction)


def format_numbers(step: dict[str, Any], *, has_time: bool = False) -> str:
    """Format the numbers of a step's event that exist, in one line; with `has_time` the time left
    too.
    """
    parts = []
    if has_time and step.get("eta_sec") is not None:
        parts.append(f"about {html.format_seconds(step['eta_sec'])} left")
    if step.get("memory_gib"):
        parts.append(f"{step['memory_gib']:.1f} GiB")
    if step.get("loss") is not None:
        parts.append(f"loss {step['loss']:.3f}")
    return " · ".join(parts)
