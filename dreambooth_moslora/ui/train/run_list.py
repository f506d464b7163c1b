"""List of runs, and the card of each."""

import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import PIL.Image

from dreambooth_moslora.disk import run_folder
from dreambooth_moslora.ui import html
from dreambooth_moslora.ui.jobs import Job, Jobs, JobState
from dreambooth_moslora.ui.photo_copies import list_photo_copies

MAX_LISTED_RUNS = 30
"""Runs in the list; older runs are left out."""
LIST_THUMBNAIL_PX = 96
"""Longer side of a run's image in the list."""
STATE_WORDS = {"running": "training", "interrupted": "stopped"}
"""State of a run -> its word in the list, where that differs."""


def list_runs(jobs: Jobs) -> list[tuple[Job, JobState]]:
    """List the newest runs, also a terminal's, without those that ended and saved nothing."""
    runs = []
    for job in jobs.list_jobs():
        state = jobs.get_state(job)
        folder = run_folder.RunDir(job.run_dir)
        if state.is_active or folder.adapter_path.is_file() or folder.find_latest_checkpoint():
            runs.append((job, state))
        if len(runs) == MAX_LISTED_RUNS:
            break
    return runs


def build_run_cards(jobs: Jobs) -> list[dict[str, str]]:
    """Build the cards of `html.build_run_list`."""
    cards = []
    for job, state in list_runs(jobs):
        word = STATE_WORDS.get(state.state, state.state)
        progress = f" · step {state.step}" if state.step else ""
        cards.append(
            {
                "run": job.name,
                "picture": find_thumbnail(job.run_dir),
                "state": f"{word}{progress}",
                "kind": state.state,
                "date": time.strftime("%d %b, %H:%M", time.localtime(job.changed_sec)).lstrip("0"),
            }
        )
    return cards


def find_thumbnail(run_dir: Path) -> str:
    """Find a small image for the list: the newest sample, or a photo; "" without both."""
    folder = run_folder.RunDir(run_dir)
    samples = folder.samples_dir.glob("*.png")
    newest = sorted(samples, key=lambda file: file.stat().st_mtime)[-1:]
    for file in newest + list_photo_copies(folder.photos_dir)[:1]:
        with suppress(OSError):
            return encode_file_thumbnail(file, file.stat().st_mtime_ns)
    return ""


@lru_cache(maxsize=4 * MAX_LISTED_RUNS)
def encode_file_thumbnail(file: Path, changed_ns: int) -> str:
    """Encode the file as a small data URL, cached while it is unchanged. Raises OSError."""
    with PIL.Image.open(file) as image:
        return html.encode_thumbnail(image.convert("RGB"), LIST_THUMBNAIL_PX)
