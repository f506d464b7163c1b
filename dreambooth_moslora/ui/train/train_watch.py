"""The events of the right half of the Train tab: the page looks at the runs and the queue, and its
buttons change them."""

from typing import Any

import gradio as gr

from dreambooth_moslora.ui import html
from dreambooth_moslora.ui.events import MESSAGE_EVENT, UNQUEUED_EVENT, on
from dreambooth_moslora.ui.state import AppContext
from dreambooth_moslora.ui.train.queue_view import QUEUE_WIDGETS, list_queue_changes
from dreambooth_moslora.ui.train.run_list import list_runs
from dreambooth_moslora.ui.train.run_view import WATCHED_WIDGETS, list_changes

SHOW_STATUS_SCRIPT = "() => setTimeout(() => bringIntoView('train_watch', 'train_status'), 200)"
"""Once it is on the page: on a phone it stands below the form."""


def connect_watch(ctx: AppContext, page: gr.Blocks, parts: dict) -> None:
    """Connect all events of the `parts`, which are `build_watch_widgets`."""
    _connect_look(ctx, page, parts)
    _connect_list(parts)
    _connect_controls(ctx, parts)
    _connect_queue(ctx, parts)


def _list_outputs(parts: dict) -> list:
    return [parts[name] for name in dict.fromkeys((*WATCHED_WIDGETS, *QUEUE_WIDGETS))]


def _map_outputs(parts: dict, changes: dict[str, Any]) -> dict:
    """Gradio wants some value even where nothing changes."""
    changes = changes or {"seen": gr.skip()}
    return {parts[name]: value for name, value in changes.items()}


def _connect_look(ctx: AppContext, page: gr.Blocks, parts: dict) -> None:
    """Look when the page is loaded, from time to time, and when another run is chosen."""

    def attach() -> str:
        """The newest run is shown: that which trains, if there is one."""
        listed = list_runs(ctx.jobs)
        return listed[0][0].name if listed else ""

    def look(run: str | None, seen: tuple | None, queue_seen: tuple | None) -> dict:
        changes = list_changes(ctx.jobs, run, seen, ctx.workspace)
        return _map_outputs(parts, changes | list_queue_changes(ctx, run, queue_seen))

    inputs = [parts["run"], parts["seen"], parts["queue_seen"]]
    outputs = _list_outputs(parts)
    page.load(attach, None, parts["run"], **UNQUEUED_EVENT).then(
        look, inputs, outputs, **UNQUEUED_EVENT
    )
    parts["timer"].tick(look, inputs, outputs, **UNQUEUED_EVENT)
    parts["run"].change(look, inputs, outputs, **UNQUEUED_EVENT)


def _connect_list(parts: dict) -> None:
    """A click in the list chooses the run."""

    @on(parts["runs"].choose, UNQUEUED_EVENT, inputs=None, outputs=parts["run"])
    def choose(event: gr.EventData) -> str:
        return str(event._data.get("run")) if isinstance(event._data, dict) else ""

    parts["runs"].choose(None, js=SHOW_STATUS_SCRIPT, **UNQUEUED_EVENT)


def _connect_controls(ctx: AppContext, parts: dict) -> None:
    """Stop and Resume."""
    shown = {"inputs": parts["run"], "outputs": parts["status"]}

    @on(parts["stop"].click, MESSAGE_EVENT, **shown)
    def stop(run: str | None) -> str:
        return html.render_notice(f"Stopping {ctx.jobs.stop(run or '').name} …")

    @on(parts["resume"].click, MESSAGE_EVENT, **shown)
    def resume(run: str | None) -> str:
        return html.render_notice(f"Going on with {ctx.jobs.resume(run or '').name} …")


def _connect_queue(ctx: AppContext, parts: dict) -> None:
    """The chosen run is removed from the queue."""
    inputs = [parts["queued"], parts["run"], parts["queue_seen"]]

    @on(parts["queue_remove"].click, MESSAGE_EVENT, inputs=inputs, outputs=_list_outputs(parts))
    def remove(chosen: str | None, run: str | None, last_state: tuple | None) -> dict:
        ctx.queue.queue.remove(chosen or "")
        return _map_outputs(parts, list_queue_changes(ctx, run, last_state))
