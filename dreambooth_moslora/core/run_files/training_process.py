"""The training command as a process of its own: how the page and a fleet start one, and what its log says.

`job_config.json` in the run folder has its settings, `job.log` what it writes to the terminal.
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
    """Train by the settings in the run folder, whose paths begin at `folder` (None: here).

    `environment` is beside this process's own, `inherits` are open files that it keeps. It is in a session of its own:
    a Ctrl-C in this terminal does not reach it.
    """
    return start_logged(run_dir, (*start, "--config", str(run_dir / CONFIG_NAME)), environment, folder, inherits)


def start_logged(
    run_dir: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    folder: str | None = None,
    inherits: Sequence[int] = (),
) -> subprocess.Popen:
    """Python with these arguments, in the same way; what it writes to the terminal goes to the log in `run_dir`."""
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
    """Of a progress bar, the last state. Empty where there is no log."""
    try:
        with (run_dir / LOG_NAME).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    shown = [line for line in text.split("\n") if line.strip()]
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in shown[-lines:])
