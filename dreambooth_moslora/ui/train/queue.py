"""The list of waiting runs, below the state of the current one; it is shown only while some wait."""

from typing import Any

import gradio as gr

from dreambooth_moslora.training.run_folders.run_queue import COMMAND_LINE, QueuedRun
from dreambooth_moslora.ui.app_state import AT_ONCE, TELLING, AppContext, as_gradio_error
from dreambooth_moslora.ui.html_snippets import faint
from dreambooth_moslora.ui.jobs.jobs import Jobs
from dreambooth_moslora.ui.server.users import Visitor
from dreambooth_moslora.ui.train.watch import run_names

__all__ = ["connect_queue", "queue_widgets", "queued_runs"]

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
