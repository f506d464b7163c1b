"""Start of the programs by a Python that cannot run them."""

import subprocess
import sys
from pathlib import Path

import pytest

from dreambooth_moslora import launcher

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "arguments", [["train_dreambooth.py"], ["app.py"], ["-m", "dreambooth_moslora", "doctor"]]
)
def test_missing_packages_are_one_line(arguments):
    """`-S` leaves out installed packages."""
    command = [sys.executable, "-S", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: the packages are not installed in ")
    assert "pip install -r requirements.txt" in result.stderr


def test_old_python_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    assert launcher.start(lambda: 1 / 0) == 2
    assert capsys.readouterr().err.startswith(
        "error: Python 3.11 or newer is needed; this is 3.9.18"
    )


def test_missing_module_of_the_program_is_a_traceback():
    def load():
        raise ModuleNotFoundError("No module", name="dreambooth_moslora.cli.gone")

    with pytest.raises(ModuleNotFoundError):
        launcher.start(load)
