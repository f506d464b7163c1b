"""What the page shows of the queue and the list of runs, and what a program is told of them."""

from typing import Any

import gradio as gr

from dreambooth_moslora.ui.jobs import Job
from dreambooth_moslora.ui.state import AppContext
from dreambooth_moslora.ui.train.run_list import run_cards

OF_QUEUE = ("queue_box", "queued", "queue_seen", "run", "runs")
"""Widgets that show the queue."""


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
    # A run that does not wait any more cannot stay chosen.
    if chosen not in [one.name for one in waiting]:
        chosen = None
    changes = {
        "queue_box": gr.Column(visible=bool(rows)),
        "queued": gr.Radio(choices=rows, value=chosen),
        "queue_seen": now,
        # Gradio replaces all that the list was told, so both go together.
        "runs": gr.HTML(cards=cards, chosen=run, visible=bool(cards)),
    }
    # A run that the page has not seen yet has just begun: watch it.
    current = ctx.jobs.current()
    known = [run, *(card["run"] for card in (seen[-1] if seen else ()))]
    if current is not None and current.name not in known:
        changes["run"] = current.name
    return changes


def queued_runs(ctx: AppContext) -> list[dict[str, Any]]:
    """The waiting runs, for a program: `run`, and its `place` from 1."""
    waiting = enumerate(ctx.queue.queue.waiting(), 1)
    return [{"run": run.name, "place": place} for place, run in waiting]


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
