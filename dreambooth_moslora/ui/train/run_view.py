"""View of the selected run: its state, buttons, images and files."""

import os
import shutil
from pathlib import Path
from typing import Any

import gradio as gr

from dreambooth_moslora.disk import events
from dreambooth_moslora.disk.processes import read_log_tail
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos.sidecars import is_sidecar_name
from dreambooth_moslora.ui import html
from dreambooth_moslora.ui.events import format_message
from dreambooth_moslora.ui.jobs import TERMINAL_RUN_MESSAGE, Job, Jobs, JobState
from dreambooth_moslora.ui.photo_copies import list_photo_copies
from dreambooth_moslora.ui.train.curves import list_curve_values
from dreambooth_moslora.ui.train.run_cards import render_status, render_verdict
from dreambooth_moslora.ui.train.watch_widgets import DOWNLOADS
from dreambooth_moslora.ui.workspace import Workspace

GONE_MESSAGE = "This run is not there any more."
"""Notice for a run whose folder was deleted."""
WATCHED_WIDGETS = (
    "run",
    "seen",
    "status",
    "stop",
    "resume",
    "use",
    *DOWNLOADS,
    "samples",
    "verdict",
    "details",
    "scores",
    "loss_curve",
    "score_curve",
    "log",
)
"""Names of the widgets that show the run."""
MAX_SAMPLES_SHOWN = 24
"""Sample images that are shown at most."""
MAX_PHOTOS_SHOWN = 4
"""Photos that are shown before them at most."""
SHOWN_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Suffixes of photos that every browser shows."""


def list_changes(
    jobs: Jobs,
    run: str | None,
    last_state: tuple | None,
    workspace: Workspace,
) -> dict[str, Any]:
    """Return new values for the `WATCHED_WIDGETS`, by name; empty if nothing is new.

    - `run` is the name of the selected run.
    - `last_state` is what the page has shown last.
    - `workspace` holds links to the run's images, from where gradio serves them.
    """
    if not run:
        return {}
    try:
        job = jobs.load_job(run)
    except UserError:
        # Its folder was deleted.
        return {"run": "", "status": html.render_notice(GONE_MESSAGE, "bad")}
    state = jobs.get_state(job)
    now = (job.name, job.began, state, len(jobs.load_metrics(job).events))
    if now == last_state:
        return {}
    return {"seen": now} | _list_values(jobs, job, state, workspace)


def _list_values(jobs: Jobs, job: Job, state: JobState, workspace: Workspace) -> dict[str, Any]:
    """Return values of the widgets for a run as it is now."""
    run_dir = RunDir(job.run_dir)
    metrics = jobs.load_metrics(job)
    is_over = not state.is_active
    ready = run_dir.adapter_path.is_file() and is_over

    def get_link(file: Path, is_ready: bool = True) -> str | None:
        """Link the file to where gradio serves it; None before it exists and is whole."""
        is_whole = is_ready and file.is_file()
        return str(copy_into_workspace(workspace, file, job.name)) if is_whole else None

    # Samples of the adapter that is drawn with, or the newest.
    best_step = find_best_step(run_dir, metrics) if ready else None
    # While it trains, the form beside them shows the photos.
    images = list_photos(job, metrics, workspace) if is_over else []
    images += list_samples(job, metrics, workspace, best_step)
    # The best step's files, if there is one.
    best = find_best_folder(run_dir) if ready else run_dir.path
    adapter = get_link(best / PUBLISHED_NAME, ready)
    kohya = get_link(best / run_dir.kohya_path.name, ready)
    label = "Download for diffusers" if kohya else DOWNLOADS["download"][0]
    # The state, and the verdict on a finished run.
    status = render_status(state, metrics)
    verdict = ""
    if state.state == "done":
        verdict = render_verdict(metrics, job.run_dir, best_step)
    can_stop = state.is_active and job.has_process
    if state.is_active and not can_stop:
        status += html.render_faint(format_message(TERMINAL_RUN_MESSAGE) + ".")
    return {
        "status": status,
        "stop": gr.Button(visible=can_stop),
        "resume": gr.Button(visible=is_over and state.state != "done"),
        "use": gr.Button(visible=ready),
        "download": gr.DownloadButton(label, value=adapter, visible=bool(adapter)),
        "download_kohya": gr.DownloadButton(value=kohya, visible=bool(kohya)),
        "samples": gr.Gallery(images, visible=bool(images)),
        "verdict": verdict,
        "details": gr.Accordion(visible=True),
        **list_curve_values(metrics, best_step),
        # CSS scrolls the log from its end, so it opens at the newest line.
        "log": f"<pre>{html.escape(read_log_tail(job.run_dir))}</pre>",
    }


def find_best_folder(run_dir: RunDir) -> Path:
    """Return the folder of the run's best adapter: of its best step, if one was stored."""
    has_best = (run_dir.best_dir / PUBLISHED_NAME).is_file()
    return run_dir.best_dir if has_best else run_dir.path


def find_best_step(run_dir: RunDir, metrics: events.EventLog) -> int | None:
    """Return the step of the best adapter; None if none was stored."""
    evaluations = events.filter_events(events.StepEvaluated, metrics.events)
    is_stored = find_best_folder(run_dir) != run_dir.path
    best = evaluations[-1].best if evaluations and is_stored else None
    return best["step"] if best else None


def list_photos(job: Job, metrics: events.EventLog, workspace: Workspace) -> list[tuple[str, str]]:
    """List (link in the workspace, caption) of the run's first photos: an even number, so that
    pairs of images stand side by side after them."""
    photos = list_photo_copies(RunDir(job.run_dir).photos_dir)
    config = metrics.get_last("start").get("config") or {}
    folder = Path(config.get("instance_data_dir") or RunDir(job.run_dir).photos_dir)
    if not photos and folder.is_dir():  # a terminal's run
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SHOWN_SUFFIXES)
        photos = [file for file in files if not is_sidecar_name(file)]
    count = min(len(photos) // 2 * 2, MAX_PHOTOS_SHOWN) or len(photos)
    return [
        (str(copy_into_workspace(workspace, file, job.name)), "Photo") for file in photos[:count]
    ]


def list_samples(
    job: Job, metrics: events.EventLog, workspace: Workspace, step: int | None = None
) -> list[tuple[str, str]]:
    """List (link in the workspace, caption) of samples: of each prompt and seed the one of step 0,
    then that of `step`, or of the last drawn before it.

    Without a step those are the newest.
    """
    sample_events = events.filter_events(events.SamplesSaved, metrics.events)
    if not sample_events:
        return []
    # A resumed run generates some samples again: the last ones count.
    by_step = {event.step: event for event in sample_events}
    latest = sample_events[-1]
    if step is not None:
        latest = by_step[max((at for at in by_step if at <= step), default=latest.step)]
    # Each prompt and seed, before and after.
    captions = {}
    first_files = map_sample_files(by_step[0]) if 0 in by_step else {}
    for request, file in map_sample_files(latest).items():
        if request in first_files:
            captions[first_files[request]] = f"Before: {request[0]}"
        captions.setdefault(file, f"Step {latest.step}: {request[0]}")
    samples_dir = RunDir(job.run_dir).samples_dir
    return [
        (str(copy_into_workspace(workspace, samples_dir / name, job.name)), caption)
        for name, caption in list(captions.items())[:MAX_SAMPLES_SHOWN]
        if (samples_dir / name).is_file()
    ]


def map_sample_files(event: events.SamplesSaved) -> dict[tuple[str, int], str]:
    """Map each prompt and seed to the name of its image."""
    names = [Path(file).name for file in event.files]
    return dict(zip(zip(event.prompts, event.seeds), names))


def copy_into_workspace(workspace: Workspace, file: Path, run: str) -> Path:
    """Hard-link or copy the file into the workspace, from where gradio may serve it."""
    target = workspace.folder / "runs" / run / file.name
    # An unchanged file need not be linked again.
    if target.exists() and target.stat().st_mtime_ns == file.stat().st_mtime_ns:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except FileExistsError:
        pass  # another view of the run has linked it meanwhile
    except OSError:
        shutil.copy2(file, target)
    return target
