"""A full disk is told in words, and stops nobody from stopping a run."""

import os
import signal
import time

import gradio as gr
import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.ui.jobs import Jobs
from dreambooth_moslora.ui.state import as_gradio_error
from tests.ui.test_handlers import OWNER

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a file that is always full")
SLEEPER = "import time; print('up', flush=True); time.sleep(60)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPER


def running(tmp_path, code: str):
    (script := tmp_path / "trainer.py").write_text(code)
    jobs = Jobs(tmp_path / "runs", script)
    job = jobs.start("dog", {}, OWNER)
    while "up" not in job.log_tail():
        time.sleep(0.02)
    (job.run_dir / ".job.json.tmp").symlink_to("/dev/full")
    return jobs, job


def test_a_run_is_stopped_even_when_the_stop_cannot_be_noted(tmp_path):
    jobs, job = running(tmp_path, SLEEPER)
    assert jobs.stop("dog", OWNER).stop_asked
    assert jobs._children[job.pid].wait(timeout=20) == -signal.SIGTERM
    with pytest.raises(UserError, match="already ended"):
        jobs.stop("dog", OWNER)


def test_a_stop_that_is_not_noted_is_remembered_until_the_run_may_be_killed(tmp_path, monkeypatch):
    jobs, job = running(tmp_path, STUBBORN)
    jobs.stop("dog", OWNER)
    assert jobs.owned("dog", OWNER).stop_asked and job.is_alive
    monkeypatch.setattr("dreambooth_moslora.ui.jobs.KILL_AFTER_SEC", 0)
    jobs.stop("dog", OWNER)
    assert jobs._children[job.pid].wait(timeout=20) == -signal.SIGKILL


def test_a_start_on_a_full_disk_is_refused_in_words(tmp_path):
    (tmp_path / "runs" / "dog").mkdir(parents=True)
    (tmp_path / "runs" / "dog" / "job_config.json").symlink_to("/dev/full")
    with pytest.raises(gr.Error, match="disk is full"):
        as_gradio_error(Jobs(tmp_path / "runs").start)("dog", {"a": 1}, OWNER)


def test_a_fault_of_ours_is_told_without_its_secrets_and_logged(caplog):
    def broken():
        raise KeyError("/secret/path")

    def broken_stream():
        yield 1
        raise KeyError("/secret/path")

    for handler in (broken, lambda: list(as_gradio_error(broken_stream)())):
        with pytest.raises(gr.Error, match="server's log") as told:
            as_gradio_error(handler)()
        assert "secret" not in told.value.message
    assert [str(record.exc_info[1]) for record in caplog.records] == ["'/secret/path'"] * 2
