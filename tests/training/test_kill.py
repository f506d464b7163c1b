"""A few kills of `tests/helpers/kill_resume.py`, which a person runs with thirty."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
def test_every_resume_after_a_kill_ends_equal():
    script = Path(__file__).parents[1] / "helpers" / "kill_resume.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "4", "--seed", "2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kills" in done.stdout and "ended equal" in done.stdout
