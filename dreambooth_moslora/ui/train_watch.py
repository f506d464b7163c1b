"""The right half of the Train tab: a run's progress, its buttons, and the runs that wait.

The right half of the Train tab: a run's progress, and the buttons to stop and resume it.

The list of waiting runs, below the state of the current one; it is shown only while some wait.
"""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import gradio as gr
import pandas as pd

from dreambooth_moslora.core.atomic_files import atomic_write
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.disk.queue import COMMAND_LINE, QueuedRun
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.ui.html import faint, notice
from dreambooth_moslora.ui.jobs import Job, Jobs
from dreambooth_moslora.ui.state import AT_ONCE, TELLING, AppContext, as_gradio_error, as_user_error, sentence
from dreambooth_moslora.ui.train_photos import Watch, link_into_user_folder, watch
from dreambooth_moslora.ui.visitors import Visitor

POLL_SEC = 2.0
NO_RUN = notice("No run yet. Add photos, say what they show, start.")
HEADROOM = 1.1
GONE = "This run is not there any more."
WATCHED = (
    "run",
    "seen",
    "status",
    "stop",
    "resume",
    "use",
    "reopen",
    "download",
    "download_kohya",
    "download_tokens",
    "download_mixers",
    "loss",
    "fidelity",
    "samples",
    "sheet",
    "log",
)


def watch_widgets(below_status: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`below_status` makes the widgets below the status."""
    plot = {"x": "step", "height": 230, "buttons": [], "visible": False}
    with gr.Row(elem_classes="tight"):
        run = gr.Dropdown([], value=None, label="Run", allow_custom_value=True, elem_id="run_picker", min_width=110)
        stop = gr.Button("Stop", variant="stop", interactive=False, min_width=76, scale=0, elem_id="stop_training")
        resume = gr.Button("Resume", interactive=False, min_width=88, scale=0, elem_id="resume")
    status = gr.HTML(NO_RUN, elem_id="train_status", label="Status")
    waiting = below_status()
    with gr.Row(elem_classes="tight"):
        use = gr.Button("Use this adapter", variant="primary", visible=False, elem_id="use_adapter")
        reopen = gr.Button("Change and train again", visible=False, elem_id="reopen")
    with gr.Row(elem_classes="tight"):
        download = gr.DownloadButton("Download the adapter", visible=False, elem_id="download_adapter")
        kohya = gr.DownloadButton("… for ComfyUI, A1111", visible=False, elem_id="download_kohya")
        tokens = gr.DownloadButton("… its new tokens", visible=False, elem_id="download_tokens")
        mixers = gr.DownloadButton("… its mixers alone", visible=False, elem_id="download_mixers")
    loss = gr.LinePlot(y="loss", color="part", title="Loss", elem_id="loss", **plot)
    fidelity = gr.LinePlot(y="score", color="measure", title="Fidelity", elem_id="fidelity", **plot)
    samples = picture_rows("Samples", "samples", object_fit="contain", buttons=["download", "fullscreen"])
    sheet = gr.Image(
        label="Contact sheet",
        show_label=False,
        type="filepath",
        format="png",
        buttons=["download", "fullscreen"],
        visible=False,
        interactive=False,
        elem_id="sheet_of_run",
    )
    with gr.Accordion("Log", open=False, elem_id="log_box"):
        log = gr.Code(language=None, label="Log", show_line_numbers=False, wrap_lines=True, elem_id="log", max_lines=20)
    downloads = (download, kohya, tokens, mixers)
    widgets = (run, gr.State(None), status, stop, resume, use, reopen, *downloads, loss, fidelity, samples, sheet, log)
    return waiting | dict(zip(WATCHED, widgets)) | {"timer": gr.Timer(POLL_SEC)}


def picture_rows(label: str, elem_id: str, **options: Any) -> gr.Gallery:
    """Pictures in rows of four, for viewing; hidden until there are some."""
    shape = {"columns": 4, "height": "auto", "format": "png", "visible": False, "interactive": False}
    return gr.Gallery(label=label, show_label=False, elem_id=elem_id, **shape, **options)


def connect_watch(ctx: AppContext, jobs: Jobs, page: gr.Blocks, parts: dict) -> None:
    outputs = [parts[name] for name in WATCHED]

    def look(run: str | None, seen: tuple | None, request: gr.Request) -> dict:
        changes = watched(jobs, run, seen, ctx.visitors.of(request)) or {"seen": gr.skip()}
        return {parts[name]: value for name, value in changes.items()}

    def attach(request: gr.Request) -> gr.Dropdown:
        names = run_names(jobs, ctx.visitors.of(request).id)
        return gr.Dropdown(choices=names, value=names[0] if names else None)

    @as_gradio_error
    def status(run: str | None, request: gr.Request) -> dict:
        return status_of(jobs, jobs.owned(run or "", ctx.visitors.of(request).id))

    page.load(attach, None, parts["run"], **AT_ONCE).then(look, [parts["run"], parts["seen"]], outputs, **AT_ONCE)
    parts["timer"].tick(look, [parts["run"], parts["seen"]], outputs, **AT_ONCE)
    parts["run"].change(look, [parts["run"], parts["seen"]], outputs, **AT_ONCE)
    _connect_control(ctx, parts["stop"], parts, jobs.stop, "stop_training")
    _connect_control(ctx, parts["resume"], parts, jobs.resume, "resume_training")
    gr.api(status, api_name="train_status")


def status_of(jobs: Jobs, job: Job) -> dict[str, Any]:
    """A run's state for a program."""
    state = jobs.state(job)
    facts = {"run": job.name, "state": state.state, "step": state.step, "steps": state.max_train_steps}
    return facts | ({"message": jobs.told(state.message)} if state.message else {})


def _connect_control(
    ctx: AppContext, button: gr.Button, parts: dict, action: Callable[[str, str], Job], api_name: str
) -> None:
    """Stop and Resume, which work only on the visitor's own runs.

    The page's own event does not join the queue, which may be full when a run must be stopped. So errors are
    shown on the card.
    """

    def control(run: str | None, request: gr.Request) -> str:
        job = action(run or "", ctx.visitors.of(request).id)
        return notice(f"{'Stopping' if job.stop_asked else 'Going on with'} {job.name} …")

    def told(run: str | None, request: gr.Request) -> str:
        try:
            return control(run, request)
        except Exception as error:
            return notice(sentence(as_user_error(error)), "bad")

    button.click(told, parts["run"], parts["status"], queue=False, api_visibility="private")
    gr.api(as_gradio_error(control), api_name=api_name, queue=False)


def watched(jobs: Jobs, run: str | None, seen: tuple | None, visitor: Visitor) -> dict[str, Any]:
    """New values for the widgets in WATCHED, by name; empty while the run is as it was `seen`."""
    if not run:
        return {}
    try:
        job = jobs.owned(run, visitor.id)
    except UserError:
        return _gone(run_names(jobs, visitor.id))
    now = watch(jobs, job, visitor)
    return {} if now.version == seen else _updates(now, job, visitor)


def _gone(names: list[str]) -> dict[str, Any]:
    """The folder of the run was deleted, or it is another's, which must look the same."""
    downloads = [name for name in WATCHED if name.startswith("download")]
    hidden = ("use", "reopen", *downloads, "loss", "fidelity", "samples", "sheet")
    return {
        "run": gr.Dropdown(choices=names, value=None),
        "seen": None,
        "status": notice(GONE, "bad"),
        "stop": gr.Button(interactive=False),
        "resume": gr.Button(interactive=False),
        "log": "",
    } | {name: gr.update(visible=False) for name in hidden}


def _updates(now: Watch, job: Job, visitor: Visitor) -> dict[str, Any]:
    run_dir = RunDir(job.run_dir)
    ready = run_dir.adapter_path.is_file() and not now.state.is_active
    resumable = not now.state.is_active and now.state.state != "done"
    return {
        "seen": now.version,
        "status": now.status,
        "stop": gr.Button(interactive=now.state.is_active),
        "resume": gr.Button(interactive=resumable),
        "use": gr.Button(visible=ready),
        "reopen": gr.Button(visible=not now.state.is_active),
        "download": _download(run_dir.adapter_path, ready, job, visitor),
        "download_kohya": _download(run_dir.kohya_path, ready and run_dir.kohya_path.is_file(), job, visitor),
        "download_tokens": _download_tokens(run_dir.tokens_paths if ready else [], job, visitor),
        "download_mixers": _download(run_dir.mixers_path, ready and run_dir.mixers_path.is_file(), job, visitor),
        "loss": _plot(now.loss, "loss"),
        "fidelity": _plot(now.fidelity, "score"),
        "samples": gr.Gallery(now.samples, visible=bool(now.samples)),
        "sheet": _sheet(run_dir.contact_sheet_path, ready, job, visitor),
        "log": now.log,
    }


def _sheet(file: Path, ready: bool, job: Job, visitor: Visitor) -> gr.Image:
    """The photos, and pictures before and after the training; of several subjects, one after the other."""
    is_there = ready and file.is_file()
    return gr.Image(str(link_into_user_folder(file, visitor, job.name)) if is_there else None, visible=is_there)


def _download(file: Path, ready: bool, job: Job, visitor: Visitor) -> gr.DownloadButton:
    return gr.DownloadButton(
        value=str(link_into_user_folder(file, visitor, job.name)) if ready else None, visible=ready
    )


def _download_tokens(files: list[Path], job: Job, visitor: Visitor) -> gr.DownloadButton:
    """The file of new tokens; of several subjects, all files in one."""
    if len(files) < 2:
        return _download(*files or [Path()], bool(files), job, visitor)
    bundle = visitor.folder / "runs" / job.name / f"{job.name}_emb.zip"
    if not bundle.is_file() or bundle.stat().st_mtime < max(file.stat().st_mtime for file in files):
        content = BytesIO()
        with ZipFile(content, "w") as archive:
            for file in files:
                archive.write(file, file.name)
        atomic_write(bundle, content.getvalue())
    return gr.DownloadButton(value=str(bundle), visible=True)


def _plot(table: pd.DataFrame, y: str) -> gr.LinePlot:
    """A line plot, shown once it has a line. It leaves room above the maximum, where gradio would cut the axis."""
    low, high = (table[y].min(), table[y].max()) if len(table) else (0.0, 0.0)
    return gr.LinePlot(table, y_lim=[min(0.0, HEADROOM * low), HEADROOM * high], visible=table.step.nunique() > 1)


def run_names(jobs: Jobs, owner: str) -> list[str]:
    return [job.name for job in jobs.of(owner)]


SHOWN = ("queue_box", "queued", "queue_rest", "queue_seen", "run")


def queue_widgets() -> dict[str, Any]:
    with gr.Column(visible=False, elem_id="queue_box") as box:
        queued = gr.Radio([], value=None, label="Waiting runs; choose one to move it", elem_id="queued")
        rest = gr.HTML("", elem_id="queue_rest")
        with gr.Row(elem_classes="tight"):
            up = gr.Button("Up", min_width=60, elem_id="queue_up")
            down = gr.Button("Down", min_width=60, elem_id="queue_down")
            remove = gr.Button("Remove", min_width=80, elem_id="queue_remove")
    seen = gr.State(None)
    widgets = {"queue_box": box, "queued": queued, "queue_rest": rest, "queue_seen": seen}
    return widgets | {"queue_up": up, "queue_down": down, "queue_remove": remove}


def connect_queue(ctx: AppContext, jobs: Jobs, page: gr.Blocks, parts: dict) -> None:
    outputs = [parts[name] for name in SHOWN]
    inputs = [parts["run"], parts["queue_seen"]]

    def look(run: str | None, seen: tuple | None, request: gr.Request) -> dict:
        changes = queue_changes(ctx, jobs, ctx.visitors.of(request), run, seen)
        return {parts[name]: value for name, value in (changes or {"queue_seen": gr.skip()}).items()}

    def control(change: Any) -> Any:
        @as_gradio_error
        def changed(chosen: str | None, run: str | None, request: gr.Request) -> dict:
            visitor = ctx.visitors.of(request)
            change(chosen or "", visitor.id)
            shown = queue_changes(ctx, jobs, visitor, run, None, chosen)
            return {parts[name]: value for name, value in shown.items()}

        return changed

    def move(place: str) -> Any:
        return lambda name, owner: ctx.queue.queue.move(name, place, owner)

    buttons = {"queue_up": move("up"), "queue_down": move("down"), "queue_remove": ctx.queue.queue.remove}
    for name, change in buttons.items():
        parts[name].click(control(change), [parts["queued"], parts["run"]], outputs, **TELLING)
    page.load(look, inputs, outputs, **AT_ONCE)
    parts["timer"].tick(look, inputs, outputs, **AT_ONCE)
    _connect_programs(ctx)


def _connect_programs(ctx: AppContext) -> None:
    @as_gradio_error
    def queue(request: gr.Request) -> list:
        return queued_runs(ctx, ctx.visitors.of(request))

    @as_gradio_error
    def move_in_queue(run: str, place: str = "first", request: gr.Request = None) -> list:
        visitor = ctx.visitors.of(request)
        ctx.queue.queue.move(str(run), str(place), visitor.id)
        return queued_runs(ctx, visitor)

    @as_gradio_error
    def remove_from_queue(run: str, request: gr.Request) -> list:
        visitor = ctx.visitors.of(request)
        ctx.queue.queue.remove(str(run), visitor.id)
        return queued_runs(ctx, visitor)

    for endpoint in (queue, move_in_queue, remove_from_queue):
        gr.api(endpoint, api_name=endpoint.__name__, queue=False)


def queued_runs(ctx: AppContext, visitor: Visitor) -> list[dict[str, Any]]:
    """The visitor's own waiting runs, for a program: `run`, and its `place` from 1 among all."""
    waiting = enumerate(ctx.queue.queue.waiting(), 1)
    return [{"run": run.name, "place": place} for place, run in waiting if run.owner == visitor.id]


def queue_changes(
    ctx: AppContext, jobs: Jobs, visitor: Visitor, run: str | None, seen: tuple | None, chosen: str | None = None
) -> dict[str, Any]:
    """New values for the widgets in SHOWN, by name; empty while the queue is as it was `seen`.

    `run` is the watched run. A `chosen` run stays chosen after its visitor moved it; after other changes none
    is chosen, as it may no longer wait.
    """
    waiting, names = ctx.queue.queue.waiting(), run_names(jobs, visitor.id)
    rows = [(f"{place} · {words_of(one)}", one.name) for place, one in enumerate(waiting, 1) if one.owner == visitor.id]
    rest = rest_of(waiting, visitor)
    now = (rows, rest, names)
    if now == seen:
        return {}
    return {
        "queue_box": gr.Column(visible=bool(rows or rest)),
        "queued": gr.Radio(choices=rows, value=chosen if chosen in dict(map(reversed, rows)) else None),
        "queue_rest": rest,
        "queue_seen": now,
        "run": _watched_run(jobs, visitor, run, names),
    }


def words_of(run: QueuedRun) -> str:
    steps, exposures = run.settings.get("max_train_steps"), run.settings.get("exposures_per_photo")
    length = f"{steps} steps" if steps else f"each photo {exposures} times" if exposures else ""
    return f"{run.name} · {length}" if length else run.name


def rest_of(waiting: list[QueuedRun], visitor: Visitor) -> str:
    """The command line's waiting runs by name, and the number of other visitors' runs; "" when there are none."""
    named = [f"{place} · {run.name}" for place, run in enumerate(waiting, 1) if run.owner == COMMAND_LINE]
    others = sum(run.owner not in (COMMAND_LINE, visitor.id) for run in waiting)
    parts = [f"added by command: {', '.join(named)}"] * bool(named)
    parts += [f"{others} of other visitors"] * bool(others)
    return faint("; ".join(parts)) if parts else ""


def _watched_run(jobs: Jobs, visitor: Visitor, run: str | None, names: list[str]) -> gr.Dropdown:
    """Watch the visitor's run whose turn has come, unless another running one is watched."""
    current = jobs.current()
    if current is None or current.owner != visitor.id or current.name == run:
        return gr.Dropdown(choices=names)
    return gr.Dropdown(choices=names, value=current.name)
