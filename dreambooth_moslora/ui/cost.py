"""What a run would cost: the training program itself is asked, by its `--dry_run`, before anything is spent."""

import json
import os
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.ui.context import AppContext
from dreambooth_moslora.ui.jobs import Jobs
from dreambooth_moslora.ui.train_form import TrainForm
from dreambooth_moslora.ui.visitors import Visitor

__all__ = ["estimate_cost"]

TIMEOUT_SEC = 300
SHOWN_LINES = 20


def estimate_cost(ctx: AppContext, jobs: Jobs, form: TrainForm, visitor: Visitor) -> str:
    """The dry run's answer as HTML. Raises UserError with its last line when it refuses."""
    photos = visitor.folder / "photos"
    if not any(photos.glob("photo_*")):
        raise UserError("add some photos of your subject first")
    if jobs.current():
        raise UserError("a run is going on; an estimate beside it would mislead")
    with tempfile.TemporaryDirectory(dir=visitor.folder) as scratch:
        config = form.config(ctx.base_name, ctx.resolution_px, photos, Path(scratch) / "run")
        answer = _ask(jobs.script, Path(scratch), config)
    return f'<div class="card"><pre class="log">{escape(answer)}</pre></div>'


def _ask(script: Path, scratch: Path, config: dict) -> str:
    file = scratch / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, str(script), "--config", str(file), "--dry_run"]
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SEC, env=environment, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"the estimate took more than {TIMEOUT_SEC // 60} minutes and was given up") from error
    lines = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
    if done.returncode != 0:
        raise UserError(lines[-1][:300] if lines else "the estimate failed without a word")
    return "\n".join(lines[-SHOWN_LINES:]).replace(str(scratch), "…").replace(str(scratch.parent), "…")
