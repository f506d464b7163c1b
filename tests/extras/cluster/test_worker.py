"""One worker's training: the real command as a process, killed, stopped, orphaned, and resumed to the same bytes."""

from pathlib import Path

import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.processes import write_settings
from dreambooth_moslora.disk.queue import locked, take
from dreambooth_moslora.extras.cluster import worker
from dreambooth_moslora.extras.cluster.records import Record, read_record, stop_path, write_record
from dreambooth_moslora.extras.cluster.worker import Job, judged, train_subject


def job_in(folder: Path, **settings) -> Job:
    return Job(str(folder / "rex"), settings, "mark")


def test_what_is_done_is_not_trained_again(tmp_path):
    job = job_in(tmp_path)
    (tmp_path / "rex").mkdir()
    write_record(tmp_path / "rex", done := Record("done", "mark", starts=1))
    (tmp_path / "rex" / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    assert train_subject(job) == done


def test_a_fleet_that_stops_begins_none(tmp_path):
    stop_path(tmp_path).touch()
    assert train_subject(job_in(tmp_path)).state == "interrupted"
    assert not (tmp_path / "rex" / "job.log").exists()


def test_a_folder_that_another_training_holds_is_waited_for_and_then_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "HELD_SEC", 0.3)
    (tmp_path / "rex").mkdir()
    with locked(tmp_path / "rex"):
        record = train_subject(job_in(tmp_path))
    assert record.state == "failed" and "is training there" in record.message


def test_a_training_holds_its_folder_from_before_its_start_and_without_its_worker(tmp_path):
    job, run = job_in(tmp_path, rank=0), tmp_path / "rex"
    run.mkdir()
    write_settings(run, job.settings)
    with worker.held(run) as hold:
        training = worker.start_guarded(job, ("train", "--config", str(run / "job_config.json")), (hold.fileno(),))
    with pytest.raises(UserError, match="is training there"):
        take(run / worker.HOLD_NAME, "--out")
    training.wait()
    take(run / worker.HOLD_NAME, "--out").close()


@pytest.mark.parametrize(
    ("code", "log", "state", "message"),
    [
        (0, "error: of an earlier start\n", "done", ""),
        (130, "", "interrupted", ""),
        (2, "error: old\nerror: no usable photo\nleaked semaphores\n", "failed", "no usable photo"),
        (-9, "step 3\n", "failed", "The process was killed by SIGKILL, perhaps for want of memory."),
        (1, "Traceback\nZeroDivisionError: ours\n", "failed", "ZeroDivisionError: ours"),
    ],
)
def test_each_ending_has_its_line(code, log, state, message, tmp_path):
    (tmp_path / "rex").mkdir()
    (tmp_path / "rex" / "job.log").write_text(log)
    record = judged(tmp_path / "rex", code)
    assert (record.state, record.message) == (state, message) and read_record(tmp_path / "rex") == record


def test_a_mistake_is_the_subjects_own_line(tmp_path):
    record = train_subject(job_in(tmp_path, pretrained_model_name_or_path="toy", instance_prompt="x", rank=0))
    assert record.state == "failed" and record.message.startswith("--rank 0") and record.starts == 1
