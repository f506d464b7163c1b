"""The right half of the Train tab: all runs, the chosen one's progress, and the runs that wait."""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
import PIL.Image

from dreambooth_moslora.disk import events, run_folder
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings.measures import curves
from dreambooth_moslora.training.explain import NOTHING, closing_advice
from dreambooth_moslora.training.figures import LEAST_LIKENESS, figures_from, known_config
from dreambooth_moslora.ui import html
from dreambooth_moslora.ui.events import (
    AT_ONCE,
    TELLING,
    as_gradio_error,
    mistake_card,
    on,
    sentence,
)
from dreambooth_moslora.ui.jobs import IN_TERMINAL, Job, Jobs, JobState
from dreambooth_moslora.ui.photo_copies import kept_photos
from dreambooth_moslora.ui.state import AppContext
from dreambooth_moslora.ui.train import train_form
from dreambooth_moslora.ui.workspace import Workspace
from dreambooth_moslora.values import is_finite_number

POLL_SEC = 2.0
"""How often the page looks at the run, s."""
NO_RUN = html.remarks_card(
    [
        "Add 3 to 10 photos of one subject, in several places.",
        "Say in one word what they show, such as dog.",
        "Start training. Pictures come here while it learns, and you can stop it at any time.",
    ],
    "No run yet. Here you will watch it learn.",
)
GONE = "This run is not there any more."
"""States without a run."""
MOST_LISTED = 30
"""Runs in the list; the oldest are left out."""
LISTED_PX = 96
"""Longer side of a run's picture in the list."""
STATES = {
    "starting": "starting",
    "running": "training",
    "stopping": "stopping",
    "done": "done",
    "interrupted": "stopped",
    "failed": "failed",
}
"""State of a run -> its word in the list."""
HEADROOM = 1.1
"""Height of a plot, as a multiple of its highest value."""
DOWNLOADS = {
    "download": ("Download for diffusers", "download_adapter"),
    "download_kohya": ("For ComfyUI", "download_kohya"),
}
"""Name -> label and id of a button."""
PICTURES = ("samples", "sheet", "details", "loss", "fidelity")
"""Widgets that are hidden until there is something in them."""
WATCHED = (
    "run",
    "seen",
    "status",
    "stop",
    "resume",
    "use",
    "reopen",
    *DOWNLOADS,
    *PICTURES,
    "log",
)
"""Widgets that show the run."""
LEARNED = "It learned your subject: likeness to the photos rose from {:.0%} to {:.0%}."
NOT_LEARNED = "It hardly learned your subject: likeness to the photos was {:.0%}, and is {:.0%}."
LOOK_YOURSELF = "Nothing was measured. Are the new pictures like your photos?"
"""Verdicts on a finished run; the first two with likeness before and now."""
PLOT_POINTS = 200
"""About how many points of the loss are drawn."""
SMOOTHING_STEPS = 25
"""Steps over which the loss is averaged."""
BEFORE = "before"
"""Caption of pictures that were drawn before the first step."""
MAX_SAMPLES_SHOWN = 24
"""Sample pictures that are shown at most."""
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


def watch_widgets() -> dict[str, Any]:
    """The widgets of the runs and of the queue, by name."""
    parts: dict[str, Any] = {"timer": gr.Timer(POLL_SEC), "seen": gr.State(None)}
    # All runs, and how far the chosen one is. Programs and events know it by its name.
    parts["runs"] = html.run_list("runs")
    parts["run"] = gr.Textbox("", label="Run", visible=False)
    parts["status"] = gr.HTML(NO_RUN, elem_id="train_status", label="Status")
    # What can be done with it, as it trains and when it has ended.
    button = {"visible": False, "min_width": 76}
    with gr.Row(elem_classes="tight ended"):
        parts["stop"] = gr.Button("Stop", variant="stop", elem_id="stop_training", **button)
        parts["use"] = gr.Button("Draw with it", elem_id="use_adapter", **button)
        parts["resume"] = gr.Button("Resume", elem_id="resume", **button)
        parts["reopen"] = gr.Button("Use its photos again", elem_id="reopen", **button)
        for name, (label, elem_id) in DOWNLOADS.items():
            parts[name] = gr.DownloadButton(label, elem_id=elem_id, **button)
    # Its pictures: the newest while it trains, and before and after when it has ended.
    parts["samples"] = gr.Gallery(
        label="Samples",
        columns=4,
        height="auto",
        object_fit="contain",
        visible=False,
        elem_id="samples",
        **html.SHOWN,
    )
    parts["sheet"] = gr.Image(
        label="Before and after",
        type="filepath",
        visible=False,
        elem_id="sheet_of_run",
        **html.SHOWN,
    )
    parts |= queue_widgets()
    # For whoever wants to know more.
    look = {"open": False, "visible": False, "elem_id": "log_box"}
    with gr.Accordion("Curves and log", **look) as parts["details"]:
        plot = {"x": "step", "height": 230, "buttons": [], "visible": False}
        parts["loss"] = gr.LinePlot(y="loss", color="part", title="Loss", elem_id="loss", **plot)
        parts["fidelity"] = gr.LinePlot(
            y="score", color="measure", title="Scores", elem_id="fidelity", **plot
        )
        look = {"show_line_numbers": False, "wrap_lines": True, "max_lines": 20}
        parts["log"] = gr.Code(language=None, label="Log", elem_id="log", **look)
    return parts


SHOW_STATUS = "() => setTimeout(() => bringIntoView('train_watch', 'train_status'), 200)"
"""Once it is on the page: on a phone it stands below the form."""


def connect_watch(ctx: AppContext, page: gr.Blocks, parts: dict) -> None:
    """The page follows the chosen run, and its buttons stop and resume it."""
    inputs = [parts["run"], parts["seen"]]
    outputs = [parts[name] for name in WATCHED]

    def attach() -> str:
        """The run that trains is shown, or else the newest."""
        current = ctx.jobs.current()
        listed = listed_runs(ctx.jobs)
        if current is None and not listed:
            return ""
        return current.name if current else listed[0][0].name

    def look(run: str | None, seen: tuple | None) -> dict:
        changes = watched(ctx.jobs, run, seen, ctx.workspace) or {"seen": gr.skip()}
        return {parts[name]: value for name, value in changes.items()}

    # Look when the page is loaded, from time to time, and when another run is chosen.
    page.load(attach, None, parts["run"], **AT_ONCE).then(look, inputs, outputs, **AT_ONCE)
    parts["timer"].tick(look, inputs, outputs, **AT_ONCE)
    parts["run"].change(look, inputs, outputs, **AT_ONCE)

    @on(parts["runs"].choose, AT_ONCE, inputs=None, outputs=parts["run"])
    def choose(event: gr.EventData) -> str:
        return str(event._data.get("run")) if isinstance(event._data, dict) else ""

    parts["runs"].choose(None, js=SHOW_STATUS, **AT_ONCE)
    stop, resume = parts["stop"], parts["resume"]
    _connect_control(ctx, stop, parts, action=ctx.jobs.stop, api_name="stop_training")
    _connect_control(ctx, resume, parts, action=ctx.jobs.resume, api_name="resume_training")

    @on(gr.api, api_name="train_status")
    def status(run: str | None) -> dict:
        return status_of(ctx, run)


def status_of(ctx: AppContext, run: str | None) -> dict[str, Any]:
    """The state of a run, for a program; with its `place` while it waits. Raises UserError."""
    unbegun = {"run": run, "state": "waiting", "step": 0, "steps": 0}
    # It waits in the queue.
    for waiting in queued_runs(ctx):
        if waiting["run"] == run:
            return unbegun | waiting
    # Its turn has come, and it starts as soon as pictures make room.
    is_next = any(one.name == run for one in ctx.queue.queue.started())
    if is_next and Job.load(ctx.jobs.run_dir(run)) is None:
        return unbegun | {"state": "starting"}
    # It has begun.
    job = ctx.jobs.recorded(run or "")
    state = ctx.jobs.state(job)
    facts = {
        "run": job.name,
        "state": state.state,
        "step": state.step,
        "steps": state.max_train_steps,
    }
    if state.message:
        facts["message"] = state.message
    return facts


def _connect_control(
    ctx: AppContext, button: gr.Button, parts: dict, action: Callable[[str], Job], api_name: str
) -> None:
    """Stop, or Resume.

    - `action` does it, and returns the run.
    - `button` and `api_name` are the page's and a program's way to it.

    """

    def act(run: str | None) -> str:
        job = action(run or "")
        return html.notice(f"{'Stopping' if job.stop_asked else 'Going on with'} {job.name} …")

    def on_page(run: str | None) -> str:
        try:
            return act(run)
        except Exception as error:
            return mistake_card(error)

    button.click(on_page, parts["run"], parts["status"], **TELLING)
    gr.api(as_gradio_error(act), api_name=api_name, queue=False)


def watched(
    jobs: Jobs,
    run: str | None,
    seen: tuple | None,
    workspace: Workspace,
) -> dict[str, Any]:
    """New values for the widgets in WATCHED, by name; empty while nothing is new.

    - `run` is the name of the chosen run.
    - `seen` is what the page has shown last.
    - `workspace` holds links to the run's pictures, from where gradio serves them.
    """
    if not run:
        return {}
    try:
        job = jobs.recorded(run)
    except UserError:
        # Its folder was deleted.
        return {"run": "", "status": html.notice(GONE, "bad")}
    state = jobs.state(job)
    now = (job.name, job.began, state, len(jobs.metrics(job).events))
    if now == seen:
        return {}
    return {"seen": now} | _shown(jobs, job, state, workspace)


def _shown(jobs: Jobs, job: Job, state: JobState, workspace: Workspace) -> dict[str, Any]:
    """Values of the widgets for a run as it is now."""
    run_dir = run_folder.RunDir(job.run_dir)
    metrics = jobs.metrics(job)
    is_over = not state.is_active
    ready = run_dir.adapter_path.is_file() and is_over
    # The contact sheet has the photos, and pictures before and after: it takes the samples' place.
    has_sheet = ready and run_dir.contact_sheet_path.is_file()
    sheet = str(link_into(workspace, run_dir.contact_sheet_path, job.name)) if has_sheet else None
    samples = [] if has_sheet else samples_of(job, metrics, workspace)
    # The state, and what to make of it.
    status = status_card(state, metrics)
    if state.state == "done":
        status += verdict_card(metrics, has_best=best_folder(run_dir) != run_dir.path)
    can_stop = state.is_active and job.has_process
    if state.is_active and not can_stop:
        status += html.faint(sentence(IN_TERMINAL) + ".")
    files = run_dir if not ready else run_folder.RunDir(best_folder(run_dir))
    kohya = files.path / run_dir.kohya_path.name
    return {
        "status": status,
        "stop": gr.Button(visible=can_stop),
        "resume": gr.Button(visible=is_over and state.state != "done"),
        "use": gr.Button(visible=ready),
        "reopen": gr.Button(visible=is_over and (job.run_dir / "photos").is_dir()),
        "download": _download(files.adapter_path, ready, job, workspace),
        "download_kohya": _download(kohya, ready, job, workspace),
        "samples": gr.Gallery(samples, visible=bool(samples)),
        "sheet": gr.Image(sheet, visible=has_sheet),
        "details": gr.Accordion(visible=True),
        "loss": _plot(loss_table(metrics), "loss"),
        "fidelity": _plot(fidelity_table(metrics), "score"),
        "log": job.log_tail(),
    }


def best_folder(run_dir: run_folder.RunDir) -> Path:
    """Where the run's best adapter lies: of its best step, if scores have kept one."""
    is_kept = (run_dir.best_dir / run_folder.PUBLISHED_NAME).is_file()
    return run_dir.best_dir if is_kept else run_dir.path


def _download(file: Path, ready: bool, job: Job, workspace: Workspace) -> gr.DownloadButton:
    """The button for a file of the run; hidden until the run has ended and the file is `ready`."""
    if not (ready and file.is_file()):
        return gr.DownloadButton(value=None, visible=False)
    return gr.DownloadButton(value=str(link_into(workspace, file, job.name)), visible=True)


def _plot(table: pd.DataFrame, y: str) -> gr.LinePlot:
    """A line plot of the column `y`, shown once it has a line."""
    low = table[y].min() if len(table) else 0.0
    high = table[y].max() if len(table) else 0.0
    # Room above the maximum, where gradio would cut the axis.
    y_lim = [min(0.0, HEADROOM * low), HEADROOM * high]
    return gr.LinePlot(table, y_lim=y_lim, visible=table.step.nunique() > 1)


def listed_runs(jobs: Jobs) -> list[tuple[Job, JobState]]:
    """The newest runs, however they were begun, but those that have ended and saved nothing."""
    found = []
    for job in jobs.all():
        state = jobs.state(job)
        folder = run_folder.RunDir(job.run_dir)
        if state.is_active or folder.adapter_path.is_file() or folder.latest_checkpoint():
            found.append((job, state))
        if len(found) == MOST_LISTED:
            break
    return found


def run_cards(jobs: Jobs) -> list[dict[str, str]]:
    """The cards of `html.run_list`."""
    cards = []
    for job, state in listed_runs(jobs):
        word = STATES.get(state.state, state.state)
        at = f" · step {state.step}" if state.step else ""
        cards.append(
            {
                "run": job.name,
                "picture": picture_of(job.run_dir),
                "state": f"{word}{at}",
                "kind": state.state,
                "date": time.strftime("%d %b, %H:%M", time.localtime(job.changed)).lstrip("0"),
            }
        )
    return cards


def picture_of(run_dir: Path) -> str:
    """A small picture for the list: the newest sample, or a photo; "" without both."""
    samples = run_folder.RunDir(run_dir).samples_dir.glob("*.png")
    newest = sorted(samples, key=lambda file: file.stat().st_mtime)[-1:]
    for file in newest + kept_photos(run_dir / "photos")[:1]:
        with suppress(OSError):
            return small_picture(file, file.stat().st_mtime_ns)
    return ""


@lru_cache(maxsize=4 * MOST_LISTED)
def small_picture(file: Path, changed_ns: int) -> str:
    """The file as a small data URL, made once while it is unchanged. Raises OSError."""
    with PIL.Image.open(file) as image:
        return html.thumbnail(image.convert("RGB"), LISTED_PX)


OF_QUEUE = ("queue_box", "queued", "queue_seen", "run", "runs")
"""Widgets that show the queue."""


def queue_widgets() -> dict[str, Any]:
    """The widgets of the runs that wait, by name; hidden while there are none."""
    parts: dict[str, Any] = {"queue_seen": gr.State(None)}
    with gr.Column(visible=False, elem_id="queue_box") as parts["queue_box"]:
        parts["queued"] = gr.Radio(
            [], value=None, label="Waiting runs; choose one to move it", elem_id="queued"
        )
        with gr.Row(elem_classes="tight"):
            for name, width in (("up", 60), ("down", 60), ("remove", 80)):
                key = f"queue_{name}"
                parts[key] = gr.Button(name.title(), min_width=width, elem_id=key)
    return parts


def connect_queue(ctx: AppContext, page: gr.Blocks, parts: dict) -> None:
    """The page follows the queue, and its buttons change it."""
    queue = ctx.queue.queue
    inputs = [parts["run"], parts["queue_seen"]]
    outputs = [parts[name] for name in OF_QUEUE]

    def shown(changes: dict[str, Any]) -> dict:
        # Gradio wants some value even where nothing changes.
        changes = changes or {"queue_seen": gr.skip()}
        return {parts[name]: value for name, value in changes.items()}

    # The buttons, each with what it does to the chosen run.
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
    }
    for name, change in buttons.items():
        parts[name].click(control(change), [parts["queued"], *inputs], outputs, **TELLING)

    # Look when the page is loaded, and from time to time.
    def look(run: str | None, seen: tuple | None) -> dict:
        return shown(queue_changes(ctx, run, seen))

    page.load(look, inputs, outputs, **AT_ONCE)
    parts["timer"].tick(look, inputs, outputs, **AT_ONCE)
    parts["run"].change(look, inputs, outputs, **AT_ONCE)
    _connect_programs(ctx)


def _connect_programs(ctx: AppContext) -> None:
    """The queue's endpoints for programs."""

    @on(gr.api, api_name="queue", queue=False)
    def queue() -> list:
        return queued_runs(ctx)

    @on(gr.api, api_name="move_in_queue", queue=False)
    def move_in_queue(run: str, place: str = "first") -> list:
        ctx.queue.queue.move(str(run), str(place))
        return queued_runs(ctx)

    @on(gr.api, api_name="remove_from_queue", queue=False)
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
    """New values for the widgets in OF_QUEUE, by name; empty while nothing is new.

    - `run` is the name of the run that the page watches. The one whose turn has come is watched
      next.
    - `seen` is what the page has shown last.
    - `chosen` is the waiting run that was moved; it stays chosen.
    """
    waiting = ctx.queue.queue.waiting()
    rows = [(f"{place} · {one.name}", one.name) for place, one in enumerate(waiting, 1)]
    cards = run_cards(ctx.jobs)
    now = (rows, run, cards)
    if now == seen:
        return {}
    # A run that the page has not seen yet has just begun: watch it.
    current = ctx.jobs.current()
    known = [run, *(card["run"] for card in (seen[-1] if seen else ()))]
    is_new = current is not None and current.name not in known
    # A run that does not wait any more cannot stay chosen.
    if chosen not in [one.name for one in waiting]:
        chosen = None
    return {
        "queue_box": gr.Column(visible=bool(rows)),
        "queued": gr.Radio(choices=rows, value=chosen),
        "queue_seen": now,
        "run": current.name if is_new else gr.skip(),
        # Gradio replaces all that the list was told, so both go together.
        "runs": gr.HTML(cards=cards, chosen=run, visible=bool(cards)),
    }


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
    seconds = step.get("step_sec") or 0
    if seconds >= 1:
        parts.append(f"{seconds:.1f} s a step")
    elif seconds:
        parts.append(f"{1 / seconds:.1f} steps/s")
    if step.get("memory_gib"):
        parts.append(f"{step['memory_gib']:.1f} GiB")
    if step.get("loss") is not None:
        parts.append(f"loss {step['loss']:.3f}")
    return " · ".join(parts)


def loss_table(metrics: events.Metrics) -> pd.DataFrame:
    """Columns step, loss, part: the subject's loss and the class's, each smoothed.

    The class has a loss with prior preservation alone.
    """
    # A resumed run repeats some steps: the last count.
    steps = {event["step"]: event for event in metrics.of("step")}
    tables = []
    for name, key in (("subject", "loss_instance"), ("class (prior)", "loss_prior")):
        values = {}
        for step, event in sorted(steps.items()):
            if is_finite_number(event.get(key)):
                values[step] = event[key]
        if values:
            smooth = pd.Series(values).rolling(SMOOTHING_STEPS, min_periods=1).mean()
            thin = smooth.iloc[:: max(1, len(smooth) // PLOT_POINTS)]
            tables.append(pd.DataFrame({"step": thin.index, "loss": thin.to_numpy(), "part": name}))
    return pd.concat(tables) if tables else pd.DataFrame({"step": [], "loss": [], "part": []})


def fidelity_table(metrics: events.Metrics) -> pd.DataFrame:
    """Columns step, score, measure: the curves of the run's plot."""
    # Measure -> its name in the plot.
    shown = curves()
    rows = []
    for event in metrics.of("evaluation"):
        for name, label in shown.items():
            if is_finite_number(event.get(name)):
                rows.append({"step": event.get("step", 0), "score": event[name], "measure": label})
    return pd.DataFrame(rows) if rows else pd.DataFrame({"step": [], "score": [], "measure": []})


def samples_of(job: Job, metrics: events.Metrics, workspace: Workspace) -> list[tuple[str, str]]:
    """(Link in the workspace, caption) of the sample pictures, the newest first.

    If there are too many, the newest and those before the training are shown.
    """
    # File -> caption. A resumed run draws some anew.
    found: dict[str, str] = {}
    for event in metrics.of("sample"):
        for name in event.get("files") or ():
            step = event.get("step")
            found[Path(str(name)).name] = f"step {step}" if step else BEFORE

    # Those that are there; within a step in their order.
    there = []
    for name, caption in found.items():
        file = job.run_dir / "samples" / name
        if file.is_file():
            there.append((file, caption))
    first = [item for item in there if item[1] == BEFORE][: MAX_SAMPLES_SHOWN // 2]
    others = [item for item in there if item[1] != BEFORE]
    steps = list(dict.fromkeys(caption for _, caption in reversed(others)))
    newest = [item for caption in steps for item in others if item[1] == caption]
    shown = newest[: MAX_SAMPLES_SHOWN - len(first)] + first
    return [(str(link_into(workspace, file, job.name)), caption) for file, caption in shown]


def link_into(workspace: Workspace, file: Path, run: str) -> Path:
    """The file inside the workspace (a hard link if possible), from where gradio may serve it."""
    target = workspace.folder / "runs" / run / file.name
    # It is there already.
    if target.exists() and target.stat().st_mtime_ns == file.stat().st_mtime_ns:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except FileExistsError:
        pass  # another look at the run has linked it meanwhile
    except OSError:
        shutil.copy2(file, target)
    return target
