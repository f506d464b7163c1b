"""What the page shows of the chosen run: its state, buttons, pictures and files."""

import os
import shutil
from pathlib import Path
from typing import Any

import gradio as gr

from dreambooth_moslora.disk import events
from dreambooth_moslora.disk.processes import log_tail
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.ui import html
from dreambooth_moslora.ui.events import sentence
from dreambooth_moslora.ui.jobs import IN_TERMINAL, Job, Jobs, JobState
from dreambooth_moslora.ui.train.run_cards import status_card, verdict_card
from dreambooth_moslora.ui.train.watch_widgets import DOWNLOADS
from dreambooth_moslora.ui.workspace import Workspace

GONE = "This run is not there any more."
"""Told of a run whose folder was deleted."""
WATCHED = (
    "run",
    "seen",
    "status",
    "stop",
    "resume",
    "use",
    *DOWNLOADS,
    "samples",
    "sheet",
    "details",
    "plot",
    "log",
)
"""Widgets that show the run."""
MAX_SAMPLES_SHOWN = 24
"""Sample pictures that are shown at most."""


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
    run_dir = RunDir(job.run_dir)
    metrics = jobs.metrics(job)
    is_over = not state.is_active
    ready = run_dir.adapter_path.is_file() and is_over

    def link(file: Path, is_ready: bool = True) -> str | None:
        """The file from where gradio serves it; None before it is there and whole."""
        is_there = is_ready and file.is_file()
        return str(link_into(workspace, file, job.name)) if is_there else None

    # The contact sheet has the photos, and pictures before and after: it takes the samples' place.
    sheet = link(run_dir.contact_sheet_path, ready)
    samples = [] if sheet else samples_of(job, metrics, workspace)
    plot = link(run_dir.loss_plot_path, is_over)
    # The best step's files, where one was kept.
    best = best_folder(run_dir) if ready else run_dir.path
    adapter = link(best / PUBLISHED_NAME, ready)
    kohya = link(best / run_dir.kohya_path.name, ready)
    label = "Download for diffusers" if kohya else DOWNLOADS["download"][0]
    # The state, and what to make of it.
    status = status_card(state, metrics)
    if state.state == "done":
        status += verdict_card(metrics, job.run_dir, has_best=best != run_dir.path)
    can_stop = state.is_active and job.has_process
    if state.is_active and not can_stop:
        status += html.faint(sentence(IN_TERMINAL) + ".")
    return {
        "status": status,
        "stop": gr.Button(visible=can_stop),
        "resume": gr.Button(visible=is_over and state.state != "done"),
        "use": gr.Button(visible=ready),
        "download": gr.DownloadButton(label, value=adapter, visible=bool(adapter)),
        "download_kohya": gr.DownloadButton(value=kohya, visible=bool(kohya)),
        "samples": gr.Gallery(samples, visible=bool(samples)),
        "sheet": gr.Image(sheet, visible=bool(sheet)),
        "details": gr.Accordion(visible=True),
        "plot": gr.Image(plot, visible=bool(plot)),
        "log": html.log(log_tail(job.run_dir)),
    }


def best_folder(run_dir: RunDir) -> Path:
    """Where the run's best adapter lies: of its best step, if scores have kept one."""
    is_kept = (run_dir.best_dir / PUBLISHED_NAME).is_file()
    return run_dir.best_dir if is_kept else run_dir.path


def samples_of(job: Job, metrics: events.Metrics, workspace: Workspace) -> list[tuple[str, str]]:
    """(Link in the workspace, caption) of the newest sample pictures."""
    # A resumed run draws some anew: the last count.
    found: dict[Path, str] = {}
    samples_dir = RunDir(job.run_dir).samples_dir
    for event in reversed(metrics.of("sample")):
        step = event.get("step")
        for name in event.get("files") or ():
            file = samples_dir / Path(str(name)).name
            if file.is_file():
                found.setdefault(file, f"step {step}" if step else "before")
    newest = list(found.items())[:MAX_SAMPLES_SHOWN]
    return [(str(link_into(workspace, file, job.name)), caption) for file, caption in newest]


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
