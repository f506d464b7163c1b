"""The right half of the Train tab: a run's progress, its buttons, and below its state the runs that
wait."""

import itertools
import os
import re
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import gradio as gr
import pandas as pd

from dreambooth_moslora.disk import events, run_folder
from dreambooth_moslora.disk.atomic import atomic_write
from dreambooth_moslora.disk.queue import QueuedRun
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings.measures import curves
from dreambooth_moslora.settings.prompts import noun_of
from dreambooth_moslora.training.explain import closing_advice, figures_from, known_config
from dreambooth_moslora.ui import generate_values, html
from dreambooth_moslora.ui.jobs import Job, Jobs, JobState
from dreambooth_moslora.ui.state import (
    AT_ONCE,
    TELLING,
    AppContext,
    as_gradio_error,
    as_user_error,
    sentence,
)
from dreambooth_moslora.ui.train import train_form
from dreambooth_moslora.ui.workspace import Workspace
from dreambooth_moslora.values import is_finite_number

POLL_SEC = 2.0
NO_RUN = html.notice("No run yet. Add photos, say what they show, start.")
HEADROOM = 1.1
GONE = "This run is not there any more."
DOWNLOADS = {
    "download": ("Download the adapter", "download_adapter"),
    "download_kohya": ("… for ComfyUI, A1111", "download_kohya"),
    "download_tokens": ("… its new tokens", "download_tokens"),
}
"""Name -> label and id of a button."""
PICTURES = ("loss", "fidelity", "samples", "sheet")
WATCHED = ("run", "seen", "status", "stop", "resume", "use", "reopen", *DOWNLOADS, *PICTURES, "log")
PLOT_POINTS = 200
SMOOTHING_STEPS = 25
MAX_SAMPLES_SHOWN = 24
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
SUBJECT_SCORE = re.compile(r"dino_subject_\d+")
MAX_WORDS = 40
ENDINGS = {
    "done": "Done.",
    "interrupted": "Stopped; a checkpoint is written.",
    "failed": "The run failed.",
}


def watch_widgets() -> dict[str, Any]:
    parts: dict[str, Any] = {"timer": gr.Timer(POLL_SEC), "seen": gr.State(None)}
    with gr.Row(elem_classes="tight"):
        look = {"allow_custom_value": True, "elem_id": "run_picker", "min_width": 110}
        parts["run"] = gr.Dropdown([], value=None, label="Run", **look)
        look = {"interactive": False, "scale": 0}
        parts["stop"] = gr.Button(
            "Stop", variant="stop", min_width=76, elem_id="stop_training", **look
        )
        parts["resume"] = gr.Button("Resume", min_width=88, elem_id="resume", **look)
    parts["status"] = gr.HTML(NO_RUN, elem_id="train_status", label="Status")
    parts |= queue_widgets()
    with gr.Row(elem_classes="tight"):
        parts["use"] = gr.Button(
            "Use this adapter", variant="primary", visible=False, elem_id="use_adapter"
        )
        parts["reopen"] = gr.Button("Change and train again", visible=False, elem_id="reopen")
    with gr.Row(elem_classes="tight"):
        for name, (label, elem_id) in DOWNLOADS.items():
            parts[name] = gr.DownloadButton(label, visible=False, elem_id=elem_id)
    plot = {"x": "step", "height": 230, "buttons": [], "visible": False}
    parts["loss"] = gr.LinePlot(y="loss", color="part", title="Loss", elem_id="loss", **plot)
    parts["fidelity"] = gr.LinePlot(
        y="score", color="measure", title="Fidelity", elem_id="fidelity", **plot
    )
    look = {
        "columns": 4,
        "height": "auto",
        "object_fit": "contain",
        "visible": False,
        "elem_id": "samples",
    }
    parts["samples"] = gr.Gallery(label="Samples", **look | html.SHOWN)
    parts["sheet"] = gr.Image(
        label="Contact sheet", type="filepath", visible=False, elem_id="sheet_of_run", **html.SHOWN
    )
    with gr.Accordion("Log", open=False, elem_id="log_box"):
        look = {"show_line_numbers": False, "wrap_lines": True, "max_lines": 20}
        parts["log"] = gr.Code(language=None, label="Log", elem_id="log", **look)
    return parts


def connect_watch(ctx: AppContext, page: gr.Blocks, parts: dict) -> None:
    inputs, outputs = [parts["run"], parts["seen"]], [parts[name] for name in WATCHED]

    def attach() -> gr.Dropdown:
        """The newest run is shown, else one of a terminal that is going on."""
        going_on = (job for job in ctx.jobs.of_terminals() if job.is_alive)
        first = next(itertools.chain(ctx.jobs.all(), going_on), None)
        return gr.Dropdown(choices=run_names(ctx.jobs), value=first.name if first else None)

    def look(run: str | None, seen: tuple | None) -> dict:
        changes = watched(ctx.jobs, run, seen, ctx.workspace) or {"seen": gr.skip()}
        return {parts[name]: value for name, value in changes.items()}

    page.load(attach, None, parts["run"], **AT_ONCE).then(look, inputs, outputs, **AT_ONCE)
    parts["timer"].tick(look, inputs, outputs, **AT_ONCE)
    parts["run"].change(look, inputs, outputs, **AT_ONCE)
    _connect_control(ctx, parts["stop"], parts, ctx.jobs.stop, "stop_training")
    _connect_control(ctx, parts["resume"], parts, ctx.jobs.resume, "resume_training")

    @gr.api(api_name="train_status")
    @as_gradio_error
    def status(run: str | None) -> dict:
        return status_of(ctx, run)


def status_of(ctx: AppContext, run: str | None) -> dict[str, Any]:
    """The state of a run, for a program; with its `place` while it waits. Raises UserError."""
    unbegun, queue = {"run": run, "state": "waiting", "step": 0, "steps": 0}, ctx.queue.queue
    if waiting := next((found for found in queued_runs(ctx) if found["run"] == run), None):
        return unbegun | waiting | ({"message": "the queue is paused"} if queue.is_paused else {})
    is_next = any(one.name == run for one in queue.started())
    # it starts as soon as pictures make room
    if is_next and Job.load(ctx.jobs.run_dir(run)) is None:
        return unbegun | {"state": "starting"}
    job = ctx.jobs.seen(run or "")
    state = ctx.jobs.state(job)
    facts = {
        "run": job.name,
        "state": state.state,
        "step": state.step,
        "steps": state.max_train_steps,
    }
    said = {"message": state.message, "remarks": job.remarks()}
    return facts | {name: words for name, words in said.items() if words}


def _connect_control(
    ctx: AppContext, button: gr.Button, parts: dict, action: Callable[[str], Job], api_name: str
) -> None:
    """Stop and Resume. The page's event does not join the queue, where pictures may wait: the card
    shows errors."""

    def control(run: str | None) -> str:
        job = action(run or "")
        return html.notice(f"{'Stopping' if job.stop_asked else 'Going on with'} {job.name} …")

    def told(run: str | None) -> str:
        try:
            return control(run)
        except Exception as error:
            return html.notice(sentence(as_user_error(error)), "bad")

    button.click(told, parts["run"], parts["status"], queue=False, api_visibility="private")
    gr.api(as_gradio_error(control), api_name=api_name, queue=False)


def watched(
    jobs: Jobs,
    run: str | None,
    seen: tuple | None,
    workspace: Workspace,
) -> dict[str, Any]:
    """New values for the widgets in WATCHED, by name; empty while the run is as it was `seen`."""
    if not run:
        return {}
    try:
        job = jobs.seen(run)
    except UserError:
        shown = {
            name: gr.update(visible=False) for name in ("use", "reopen", *DOWNLOADS, *PICTURES)
        }
        shown |= {name: gr.Button(interactive=False) for name in ("stop", "resume")}
        names = gr.Dropdown(choices=run_names(jobs), value=None)
        return shown | {"run": names, "seen": None, "status": html.notice(GONE, "bad"), "log": ""}
    state, metrics = jobs.state(job), jobs.metrics(job)
    now = (job.name, job.created, state, len(metrics.events))
    return {} if now == seen else {"seen": now} | _shown(jobs, job, state, workspace)


def _shown(jobs: Jobs, job: Job, state: JobState, workspace: Workspace) -> dict[str, Any]:
    run_dir, metrics = run_folder.RunDir(job.run_dir), jobs.metrics(job)
    ready = run_dir.adapter_path.is_file() and not state.is_active
    # the photos, and pictures before and after
    has_sheet = ready and is_own_file(run_dir.contact_sheet_path, job)
    sheet = str(link_into(workspace, run_dir.contact_sheet_path, job.name)) if has_sheet else None
    samples = samples_of(job, metrics, workspace)
    is_ours = not job.is_of_terminal
    status = status_card(state, metrics, best_of(job, metrics))
    return {
        "status": status
        + subjects_line(metrics)
        + (advice_card(metrics) if state.state == "done" else ""),
        "stop": gr.Button(interactive=is_ours and state.is_active),
        "resume": gr.Button(interactive=is_ours and not state.is_active and state.state != "done"),
        "use": gr.Button(visible=ready),
        "reopen": gr.Button(visible=is_ours and not state.is_active),
        "download": _download([run_dir.adapter_path], ready, job, workspace),
        "download_kohya": _download([run_dir.kohya_path], ready, job, workspace),
        "download_tokens": _download(run_dir.tokens_paths, ready, job, workspace),
        "loss": _plot(loss_table(metrics), "loss"),
        "fidelity": _plot(fidelity_table(metrics), "score"),
        "samples": gr.Gallery(samples, visible=bool(samples)),
        "sheet": gr.Image(sheet, visible=has_sheet),
        "log": job.log_tail(),
    }


def _download(files: list[Path], ready: bool, job: Job, workspace: Workspace) -> gr.DownloadButton:
    """The file that is there, or of several all in one; hidden for none."""
    files = [file for file in files if ready and is_own_file(file, job)]
    if len(files) < 2:
        linked = [str(link_into(workspace, file, job.name)) for file in files]
        return gr.DownloadButton(value=linked[0] if linked else None, visible=bool(linked))
    bundle = workspace.folder / "runs" / job.name / f"{job.name}_emb.zip"
    if not bundle.is_file() or bundle.stat().st_mtime < max(file.stat().st_mtime for file in files):
        content = BytesIO()
        with ZipFile(content, "w") as archive:
            for file in files:
                archive.write(file, file.name)
        atomic_write(bundle, content.getvalue())
    return gr.DownloadButton(value=str(bundle), visible=True)


def _plot(table: pd.DataFrame, y: str) -> gr.LinePlot:
    """A line plot, shown once it has a line. It leaves room above the maximum, where gradio would
    cut the axis."""
    low, high = (table[y].min(), table[y].max()) if len(table) else (0.0, 0.0)
    return gr.LinePlot(
        table, y_lim=[min(0.0, HEADROOM * low), HEADROOM * high], visible=table.step.nunique() > 1
    )


def run_names(jobs: Jobs) -> list[str | tuple[str, str]]:
    """The runs of the page and of the queue, then those of terminals under (label, name)."""
    own = [job.name for job in jobs.all()]
    return own + [(f"{job.name} · in a terminal", job.name) for job in jobs.of_terminals()]


OF_QUEUE = ("queue_box", "queued", "queue_rest", "queue_seen", "run", "queue_pause")
PAUSED = "Paused: what trains goes on to its end, and no next run starts."


def queue_widgets() -> dict[str, Any]:
    parts: dict[str, Any] = {"queue_seen": gr.State(None)}
    with gr.Column(visible=False, elem_id="queue_box") as parts["queue_box"]:
        parts["queued"] = gr.Radio(
            [], value=None, label="Waiting runs; choose one to move it", elem_id="queued"
        )
        parts["queue_rest"] = gr.HTML("", elem_id="queue_rest")
        with gr.Row(elem_classes="tight"):
            for name, width in (("up", 60), ("down", 60), ("remove", 80)):
                parts[f"queue_{name}"] = gr.Button(
                    name.title(), min_width=width, elem_id=f"queue_{name}"
                )
        parts["queue_pause"] = gr.Button("Pause the queue", size="sm", elem_id="queue_pause")
    return parts


def connect_queue(ctx: AppContext, page: gr.Blocks, parts: dict) -> None:
    queue, outputs = ctx.queue.queue, [parts[name] for name in OF_QUEUE]
    inputs = [parts["run"], parts["queue_seen"]]

    def shown(changes: dict[str, Any]) -> dict:
        return {
            parts[name]: value for name, value in (changes or {"queue_seen": gr.skip()}).items()
        }

    def control(change: Callable[[str], Any]) -> Callable:
        @as_gradio_error
        def changed(chosen: str | None, run: str | None, seen: tuple | None) -> dict:
            change(chosen or "")
            return shown(queue_changes(ctx, run, seen, chosen))

        return changed

    buttons = {
        "queue_up": lambda name: queue.move(name, "up"),
        "queue_down": lambda name: queue.move(name, "down"),
        "queue_remove": queue.remove,
        "queue_pause": lambda name: queue.pause(not queue.is_paused),
    }
    for name, change in buttons.items():
        parts[name].click(control(change), [parts["queued"], *inputs], outputs, **TELLING)

    def look(run: str | None, seen: tuple | None) -> dict:
        return shown(queue_changes(ctx, run, seen))

    page.load(look, inputs, outputs, **AT_ONCE)
    parts["timer"].tick(look, inputs, outputs, **AT_ONCE)
    _connect_programs(ctx)


def _connect_programs(ctx: AppContext) -> None:
    @gr.api(api_name="queue", queue=False)
    @as_gradio_error
    def queue() -> list:
        return queued_runs(ctx)

    @gr.api(api_name="move_in_queue", queue=False)
    @as_gradio_error
    def move_in_queue(run: str, place: str = "first") -> list:
        ctx.queue.queue.move(str(run), str(place))
        return queued_runs(ctx)

    @gr.api(api_name="remove_from_queue", queue=False)
    @as_gradio_error
    def remove_from_queue(run: str) -> list:
        ctx.queue.queue.remove(str(run))
        return queued_runs(ctx)


def queued_runs(ctx: AppContext) -> list[dict[str, Any]]:
    """The waiting runs, for a program: `run`, and its `place` from 1."""
    waiting = enumerate(ctx.queue.queue.waiting(), 1)
    return [{"run": run.name, "place": place} for place, run in waiting]


def queue_changes(
    ctx: AppContext,
    run: str | None,
    seen: tuple | None,
    chosen: str | None = None,
) -> dict[str, Any]:
    """New values for the widgets in OF_QUEUE, by name; empty while the queue is as it was `seen`.
    The run whose turn has come is watched next. A `chosen` run stays chosen after it was moved."""
    waiting, names = ctx.queue.queue.waiting(), run_names(ctx.jobs)
    rows = [(f"{place} · {words_of(one)}", one.name) for place, one in enumerate(waiting, 1)]
    is_paused = ctx.queue.queue.is_paused
    now = (rows, is_paused, names)
    if now == seen:
        return {}
    current = ctx.jobs.current()
    known = (run, *(seen[-1] if seen else ()))
    is_next = current is not None and current.name not in known
    return {
        "queue_box": gr.Column(visible=bool(rows or is_paused)),
        "queued": gr.Radio(
            choices=rows, value=chosen if chosen in dict(map(reversed, rows)) else None
        ),
        "queue_rest": html.faint(PAUSED) if is_paused else "",
        "queue_seen": now,
        "queue_pause": gr.Button("Go on" if is_paused else "Pause the queue"),
        "run": gr.Dropdown(choices=names, value=current.name)
        if is_next
        else gr.Dropdown(choices=names),
    }


def words_of(run: QueuedRun) -> str:
    steps, exposures = run.settings.get("max_train_steps"), run.settings.get("exposures_per_photo")
    length = f"{steps} steps" if steps else f"each photo {exposures} times" if exposures else ""
    return f"{run.name} · {length}" if length else run.name


def best_of(job: Job, metrics: events.Metrics) -> str:
    """The best step and the name of its adapter on the page; "" without scores."""
    best = metrics.last("evaluation").get("best")
    is_kept = (run_folder.RunDir(job.run_dir).best_dir / run_folder.PUBLISHED_NAME).is_file()
    return (
        f" The best was step {best.get('step')}: {job.name}@best."
        if isinstance(best, dict) and is_kept
        else ""
    )


def subjects_line(metrics: events.Metrics) -> str:
    """How well the last scores tell several subjects apart, and the likeness of each; "" of one
    subject."""
    last = metrics.last("evaluation")
    if not is_finite_number(last.get("confusion")):
        return ""
    likeness = [
        f"{last[name]:.2f} of subject {name.rpartition('_')[2]}" for name in subject_scores(metrics)
    ]
    scale = "0: told apart as their photos are, 1: taken for each other"
    return html.faint(
        f"Confusion of the subjects: {last['confusion']:.2f} ({scale}). Likeness: {', '.join(likeness)}."
    )


def subject_scores(metrics: events.Metrics) -> list[str]:
    """The names of each subject's likeness in the last scores; none of one subject."""
    found = [
        name for name, value in metrics.last("evaluation").items() if SUBJECT_SCORE.fullmatch(name)
    ]
    return [name for name in found if is_finite_number(metrics.last("evaluation")[name])]


def advice_card(metrics: events.Metrics) -> str:
    """What to try after a scored run, the most important first; "" for other runs, and for damaged
    events."""
    try:
        config = known_config(metrics.last("start").get("config") or {})
    except UserError:
        return ""
    found = closing_advice(figures_from(metrics.events, config))
    return "".join(
        html.faint(f"Try next: {train_form.in_the_forms_words(line)}.") for line in found
    )


def status_card(state: JobState, metrics: events.Metrics, best: str = "") -> str:
    """One line of state and one of numbers."""
    if state.state in ENDINGS:
        detail = state.message or f"Step {state.step} of {state.max_train_steps}."
        # without a checkpoint: stopped before the first step
        if state.state == "interrupted" and state.message:
            return html.notice(f"{sentence(state.message)}.", "good")
        kind = "bad" if state.state == "failed" else "good"
        return html.notice(f"{ENDINGS[state.state]} {detail}{best}", kind)
    if state.state == "starting":
        return html.progress_card("Starting …", "loading the libraries", 0.0)
    last, phase = metrics.last("step"), metrics.last("phase")
    fraction = state.step / state.max_train_steps if state.max_train_steps else 0.0
    if state.state == "stopping":
        return html.progress_card(
            "Stopping …", "the step is finished and a checkpoint written", fraction
        )
    if state.phase in ("", "training") and last:
        return html.progress_card(
            f"Step {state.step} of {state.max_train_steps}", numbers_of(last), fraction
        )
    if state.phase == "training":
        return html.progress_card(
            f"Step {state.step + 1} of {state.max_train_steps} …",
            "the first takes longest",
            fraction,
        )
    count = f" {phase.get('done')} of {phase['total']}" if int(phase.get("total") or 1) > 1 else ""
    return html.progress_card(
        f"{PHASES.get(state.phase, state.phase or 'Preparing')}{count} …",
        numbers_of(last),
        fraction,
    )


def numbers_of(step: dict[str, Any]) -> str:
    if not step:
        return ""
    seconds = step.get("step_sec") or 0
    pace = (
        ""
        if not seconds
        else f"{1 / seconds:.1f} steps/s"
        if seconds < 1
        else f"{seconds:.1f} s a step"
    )
    parts = [
        f"about {generate_values.format_seconds(step['eta_sec'])} left"
        if step.get("eta_sec") is not None
        else "",
        pace,
        f"{step['memory_gib']:.1f} GiB" if step.get("memory_gib") else "",
        f"loss {step['loss']:.3f}" if step.get("loss") is not None else "",
    ]
    return " · ".join(part for part in parts if part)


def loss_table(metrics: events.Metrics) -> pd.DataFrame:
    """Columns step, loss, part: the subject's and, with prior preservation, the class's loss, each
    smoothed."""
    # a resumed run repeats some steps
    steps = {event["step"]: event for event in metrics.of("step")}
    tables = []
    for name, key in (("subject", "loss_instance"), ("class (prior)", "loss_prior")):
        values = {
            step: event.get(key)
            for step, event in sorted(steps.items())
            if is_finite_number(event.get(key))
        }
        if values:
            smooth = pd.Series(values).rolling(SMOOTHING_STEPS, min_periods=1).mean()
            thin = smooth.iloc[:: max(1, len(smooth) // PLOT_POINTS)]
            tables.append(pd.DataFrame({"step": thin.index, "loss": thin.to_numpy(), "part": name}))
    return pd.concat(tables) if tables else pd.DataFrame({"step": [], "loss": [], "part": []})


def fidelity_table(metrics: events.Metrics) -> pd.DataFrame:
    """Columns step, score, measure: the curves of the run's plot; of several subjects, each one's
    likeness."""
    shown = curves()
    each = {name: name.rpartition("_")[2] for name in subject_scores(metrics)}
    if each:
        shown = {**each, "confusion": "confusion", "score": shown["score"]}
    rows = []
    for event in metrics.of("evaluation"):
        for name, label in shown.items():
            if is_finite_number(event.get(name)):
                rows.append({"step": event.get("step", 0), "score": event[name], "measure": label})
    return pd.DataFrame(rows) if rows else pd.DataFrame({"step": [], "score": [], "measure": []})


def samples_of(job: Job, metrics: events.Metrics, workspace: Workspace) -> list[tuple[str, str]]:
    """The sample pictures by step, as links in the workspace; those of several prompts with their
    noun. If there are too many, step 0 and the newest are kept: the base's pictures are the
    reference for the others."""
    found: dict[str, str] = {}
    for event in metrics.of("sample"):
        prompts, files = event.get("prompts"), event.get("files") or ()
        several = (
            isinstance(prompts, list)
            and len(prompts) == len(files)
            and len(set(map(str, prompts))) > 1
        )
        nouns = (
            [f" · {noun_of(str(prompt))[:MAX_WORDS]}" for prompt in prompts]
            if several
            else [""] * len(files)
        )
        for name, noun in zip(files, nouns, strict=True):
            found[Path(str(name)).name] = f"step {event.get('step')}{noun}"
    samples = [(job.run_dir / "samples" / name, caption) for name, caption in found.items()]
    there = [(file, caption) for file, caption in samples if is_own_file(file, job)]
    first = [item for item in there if item[1].partition(" · ")[0] == "step 0"][
        : MAX_SAMPLES_SHOWN // 2
    ]
    newest = [item for item in there if item not in first][-(MAX_SAMPLES_SHOWN - len(first)) :]
    return [
        (str(link_into(workspace, file, job.name)), caption) for file, caption in first + newest
    ]


def is_own_file(file: Path, job: Job) -> bool:
    """Whether it is the run's, and no link out of its folder, which may be a stranger's."""
    return run_folder.is_file_inside(file, (job.run_dir,))


def link_into(workspace: Workspace, file: Path, run: str) -> Path:
    """The file inside the workspace (a hard link if possible), from where gradio may serve it."""
    target = workspace.folder / "runs" / run / file.name
    if target.exists() and target.stat().st_mtime_ns == file.stat().st_mtime_ns:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copy2(file, target)
    return target
