"""View of the queue and the list of runs."""

from typing import Any

import gradio as gr

from dreambooth_moslora.ui.state import AppContext
from dreambooth_moslora.ui.train.run_list import build_run_cards

QUEUE_WIDGETS = ("queue_box", "queued", "queue_seen", "run", "runs")
"""Names of the widgets that show the queue."""


def list_queue_changes(
    ctx: AppContext, run: str | None, last_state: tuple | None
) -> dict[str, Any]:
    """Return new values for the `QUEUE_WIDGETS`, by name; empty if nothing is new.

    - `run` is the name of the run that the page watches. A run that has just begun is watched next.
    - `last_state` is what the page has shown last.
    """
    waiting = ctx.queue.queue.list_waiting()
    rows = [(f"{number} · {run.name}", run.name) for number, run in enumerate(waiting, 1)]
    cards = build_run_cards(ctx.jobs)
    now = (rows, run, cards)
    if now == last_state:
        return {}
    changes = {
        "queue_box": gr.Column(visible=bool(rows)),
        "queued": gr.Radio(choices=rows, value=None),
        "queue_seen": now,
        # A later answer without news takes all props but the value from a list not yet drawn.
        "runs": gr.HTML({"cards": cards, "chosen": run}, visible=bool(cards)),
    }
    # A run that the page has not seen yet has just begun: watch it.
    current = ctx.jobs.find_active_job()
    shown_runs = [run, *(card["run"] for card in (last_state[-1] if last_state else ()))]
    if current is not None and current.name not in shown_runs:
        changes["run"] = current.name
    return changes
