"""Widgets of the right half of the Train tab: the runs, the selected one, and the queue."""

from typing import Any

import gradio as gr

from dreambooth_moslora.ui import html
from dreambooth_moslora.ui.train import curves

POLL_SEC = 2.0
"""Seconds between two polls of the run."""
NO_RUN_CARD = html.render_remarks(
    [
        "Add 3 to 10 photos of one subject, in several places.",
        "Say in one word what they show, such as dog.",
        "Start training. Pictures come here while it learns, and you can stop it at any time.",
    ],
    "No run yet. Here you will watch it learn.",
)
"""Status of a page without a run."""
DOWNLOADS = {
    "download_kohya": ("Download for ComfyUI", "download_kohya"),
    "download": ("Download the LoRA", "download_adapter"),
}
"""Name of a download button -> its label and id."""


def build_watch_widgets() -> dict[str, Any]:
    """Build all of them, by name."""
    # The states of the run and of the queue that the page has shown last.
    parts: dict[str, Any] = {
        "timer": gr.Timer(POLL_SEC),
        "seen": gr.State(None),
        "queue_seen": gr.State(None),
    }
    # All runs, and the status of the selected one. Programs and events use its name.
    parts["runs"] = html.build_run_list("runs")
    parts["run"] = gr.Textbox("", label="Run", visible=False)
    parts["status"] = gr.HTML(NO_RUN_CARD, elem_id="train_status", label="Status")
    # The images come before the verdict: people judge them better than scores do.
    parts |= _build_buttons()
    parts["samples"] = _build_gallery()
    parts["verdict"] = gr.HTML("", elem_id="verdict", label="Verdict")
    parts |= curves.build_curve_widgets()
    parts |= _build_queue()
    look = {"open": False, "visible": False, "elem_id": "log_box"}
    with gr.Accordion("Log", **look) as parts["details"]:
        parts["log"] = gr.HTML("", elem_id="log", label="Log")
    return parts


def _build_buttons() -> dict[str, Any]:
    """Build the buttons of the run, while it trains and when it has ended."""
    parts = {}
    look = {"visible": False, "min_width": 76}
    with gr.Row(elem_classes="tight ended"):
        parts["stop"] = gr.Button("Stop", variant="stop", elem_id="stop_training", **look)
        parts["use"] = gr.Button("Draw with it", elem_id="use_adapter", **look)
        parts["resume"] = gr.Button("Resume", elem_id="resume", **look)
        for name, (label, elem_id) in DOWNLOADS.items():
            parts[name] = gr.DownloadButton(label, elem_id=elem_id, **look)
    return parts


def _build_gallery() -> gr.Gallery:
    """Build the images of the run: photos, then samples before and after, side by side."""
    return gr.Gallery(
        label="Photos, before and after",
        columns=4,
        height="auto",
        object_fit="contain",
        visible=False,
        elem_id="samples",
        **html.IMAGE_OPTIONS,
    )


def _build_queue() -> dict[str, Any]:
    """Build the list of waiting runs; it is hidden while there are none."""
    parts = {}
    with gr.Column(visible=False, elem_id="queue_box") as parts["queue_box"]:
        parts["queued"] = gr.Radio(
            [], value=None, label="Waiting runs; choose one to remove it", elem_id="queued"
        )
        parts["queue_remove"] = gr.Button("Remove", min_width=80, elem_id="queue_remove")
    return parts
