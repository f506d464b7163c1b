"""What `benchmarks/faults.py` relies on, without a training."""

import os
import signal
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the faults are injected on Linux")


def test_a_run_that_is_killed_before_its_first_word_has_an_empty_log(tmp_path, monkeypatch):
    from benchmarks import fault_runs

    workshop = object.__new__(fault_runs.Workshop)
    workshop.base = tmp_path
    monkeypatch.setattr(fault_runs, "become_training", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    ended = workshop.start(tmp_path, "uncached").wait()
    assert (ended.code, ended.text) == (-signal.SIGKILL, "")


def test_a_ctrl_c_before_the_scripts_first_line_is_no_fault_of_the_program(monkeypatch, tmp_path):
    from benchmarks import fault_runs

    workshop = object.__new__(fault_runs.Workshop)
    monkeypatch.setattr(fault_runs.Workshop, "arguments", lambda *_, **__: ["--help"])

    def interrupt() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist ignores it
        os.kill(os.getpid(), signal.SIGINT)

    ended = workshop.start(tmp_path, "any", before=interrupt).wait()
    assert ended.code == 130 and "Traceback" not in ended.text
