"""Events of the right half of the Train tab: polling the runs and the queue, and the buttons."""

from typing import Any

import gradio as gr

from dreambooth_moslora.ui import html
from dreambooth_moslora.ui.events import MESSAGE_EVENT, UNQUEUED_EVENT, get_event_value, on
from dreambooth_moslora.ui.state import AppContext
from dreambooth_moslora.ui.train.queue_view import QUEUE_WIDGETS, list_queue_changes
from dreambooth_moslora.ui.train.run_list import list_runs
from dreambooth_moslora.ui.train.run_view import WATCHED_WIDGETS, list_changes

SHOW_STATUS_SCRIPT = "() => setTimeout(() => bringIntoView('train_watch', 'train_status'), 200)"
"""Script that scrolls to the status, once it is on the page: on a phone it is below the form."""


def connect_watch(ctx: AppContext, page: gr.Blocks, parts: dict) -> None:
    """Connect all events of the `parts`, which are those of `build_watch_widgets`."""
    _connect_look(ctx, page, parts)
    _connect_list(parts)
    _connect_controls(ctx, parts)
    _connect_queue(ctx, parts)


def _list_outputs(parts: dict) -> list:
    return [parts[name] for name in dict.fromkeys((*WATCHED_WIDGETS, *QUEUE_WIDGETS))]


def _map_outputs(parts: dict, changes: dict[str, Any]) -> dict:
    """Map widgets to their changes; gradio requires a value even if nothing changes."""
    changes = changes or {"seen": gr.skip()}
    return {parts[name]: value for name, value in changes.items()}


def _connect_look(ctx: AppContext, page: gr.Blocks, parts: dict) -> None:
    """Poll the run when the page is loaded, from time to time, and when another is selected."""

    def attach() -> str:
        """Return the name of the newest run, which is the one in progress if there is one."""
        listed = list_runs(ctx.jobs)
        return listed[0][0].name if listed else ""

    def look(run: str | None, last_state: tuple | None, queue_seen: tuple | None) -> dict:
        changes = list_changes(ctx.jobs, run, last_state, ctx.workspace)
        return _map_outputs(parts, changes | list_queue_changes(ctx, run, queue_seen))

    inputs = [parts["run"], parts["seen"], parts["queue_seen"]]
    outputs = _list_outputs(parts)
    page.load(attach, None, parts["run"], **UNQUEUED_EVENT).then(
        look, inputs, outputs, **UNQUEUED_EVENT
    )
    parts["timer"].tick(look, inputs, outputs, **UNQUEUED_EVENT)
    parts["run"].change(look, inputs, outputs, **UNQUEUED_EVENT)


def _connect_list(parts: dict) -> None:
    """Select the run that is clicked in the list."""

    @on(parts["runs"].choose, UNQUEUED_EVENT, inputs=None, outputs=parts["run"])
    def choose(event: gr.EventData) -> str:
        return get_event_value(event, "run")

    parts["runs"].choose(None, js=SHOW_STATUS_SCRIPT, **UNQUEUED_EVENT)


def _connect_controls(ctx: AppContext, parts: dict) -> None:
    """Connect Stop and Resume."""
    options = {"inputs": parts["run"], "outputs": parts["status"]}

    @on(parts["stop"].click, MESSAGE_EVENT, **options)
    def stop(run: str | None) -> str:
        return html.render_notice(f"Stopping {ctx.jobs.stop(run or '').name} …")

    @on(parts["resume"].click, MESSAGE_EVENT, **options)
    def resume(run: str | None) -> str:
        return html.render_notice(f"Going on with {ctx.jobs.resume(run or '').name} …")


def _connect_queue(ctx: AppContext, parts: dict) -> None:
    """Remove the selected run from the queue."""
    inputs = [parts["queued"], parts["run"], parts["queue_seen"]]

    @on(parts["queue_remove"].click, MESSAGE_EVENT, inputs=inputs, outputs=_list_outputs(parts))
    def remove(queued_run: str | None, run: str | None, last_state: tuple | None) -> dict:
        ctx.queue.queue.remove(queued_run or "")
        return _map_outputs(parts, list_queue_changes(ctx, run, last_state))
