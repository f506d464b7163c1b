"""The training command as a process of its own: starting it for the page or a fleet, and reading its log.

The run folder has its settings in `job_config.json` and its terminal output in `job.log`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreambooth_moslora.core.assets import import_environment

__all__ = ["CONFIG_NAME", "LOG_NAME", "TRAIN", "log_tail", "start_logged", "start_training", "write_settings"]

CONFIG_NAME, LOG_NAME = "job_config.json", "job.log"
TRAIN = ("-P", "-m", "dreambooth_moslora", "train")
"""Arguments of Python. -P: a `torch.py` in the current folder is not imported."""
LOG_TAIL_LINES, TAIL_BYTES = 40, 64 * 1024


def write_settings(run_dir: Path, settings: Mapping[str, Any]) -> None:
    (run_dir / CONFIG_NAME).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def start_training(
    run_dir: Path,
    start: Sequence[str] = TRAIN,
    environment: Mapping[str, str] | None = None,
    folder: str | None = None,
    inherits: Sequence[int] = (),
) -> subprocess.Popen:
    """Train by the settings in the run folder, whose paths are relative to `folder` (None: the current one).

    `environment` is added to this process's own; open files in `inherits` are passed on. The process has its
    own session, so that a Ctrl-C in this terminal does not reach it.
    """
    return start_logged(run_dir, (*start, "--config", str(run_dir / CONFIG_NAME)), environment, folder, inherits)


def start_logged(
    run_dir: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    folder: str | None = None,
    inherits: Sequence[int] = (),
) -> subprocess.Popen:
    """Like `start_training`, for Python with any arguments; the terminal output goes to the log in `run_dir`."""
    own = {"PYTHONUNBUFFERED": "1", **import_environment(), **(environment or {})}
    with (run_dir / LOG_NAME).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | own,
            cwd=folder,
            start_new_session=True,
            pass_fds=inherits,
        )


def log_tail(run_dir: Path, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of the log, with the last state of progress bars. Empty without a log."""
    try:
        with (run_dir / LOG_NAME).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    shown = [line for line in text.split("\n") if line.strip()]
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in shown[-lines:])
