"""What a fleet gives to its machines and takes from them, without a cluster."""

import json
from pathlib import Path

import pytest

from dreambooth_moslora.disk.events import RunStarted, build_record
from dreambooth_moslora.disk.processes import JOB_CONFIG_NAME, write_settings
from dreambooth_moslora.disk.queue import claim_lock, lock_folder
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.cluster import fleet, worker
from dreambooth_moslora.extras.cluster.fleet import Ending, Machines, build_tasks
from dreambooth_moslora.extras.cluster.fleet_subjects import Subject
from dreambooth_moslora.extras.cluster.ray_fleet import LostTask
from dreambooth_moslora.extras.cluster.records import (
    Record,
    get_stop_path,
    read_names,
    read_record,
    write_record,
)
from dreambooth_moslora.extras.cluster.worker import Job, record_exit, train_subject
from dreambooth_moslora.plan.base_size import BaseSize
from dreambooth_moslora.plan.memory import estimate_memory
from dreambooth_moslora.settings.train_config import TrainConfig

CONFIG = TrainConfig(
    pretrained_model_name_or_path="someone/sdxl", resolution=1024, mixed_precision="bf16"
)
NEED = estimate_memory(CONFIG, BaseSize(), 1).peak_gib


def test_trainings_share_a_gpu_by_their_estimated_memory():
    assert (
        Machines(80.0, 500.0).estimate_resources(CONFIG).gpus
        == int(10_000 / int(0.9 * 80 / NEED)) / 10_000
    )
    assert Machines(8.0, 500.0).estimate_resources(CONFIG).gpus == 1.0
    assert Machines(80.0, 500.0, per_gpu=2).estimate_resources(CONFIG).gpus == 0.5
    three = Machines(80.0, 500.0, per_gpu=3).estimate_resources(CONFIG).gpus
    assert 3 * three <= 1 < 4 * three


def test_without_a_gpu_it_takes_cores_and_memory_that_there_are():
    roomy, narrow = (Machines(None, gib, cpus=2).estimate_resources(CONFIG) for gib in (500.0, 3.0))
    assert (roomy.cpus, roomy.gpus) == (2, 0.0) and roomy.memory_gib == pytest.approx(
        NEED + fleet.PROCESS_GIB
    )
    assert narrow.memory_gib == 3.0


def test_one_word_for_the_memory_means_the_same_on_all_machines(tmp_path):
    settings = {**CONFIG.to_dict(), "memory": "auto", "instance_data_dir": str(tmp_path)}
    todo = [(Subject("rex", settings), "mark")]
    for gib, plan in ((80.0, "full"), (8.5, "recompute")):
        (task,) = build_tasks(todo, tmp_path, Machines(gib, 99.0), print)
        assert task.arguments[0].settings["memory"] == plan


def test_a_subject_that_cannot_be_trained_ends_alone(tmp_path):
    good = {
        "pretrained_model_name_or_path": "toy",
        "instance_data_dir": str(tmp_path),
        "instance_prompt": "x",
    }
    lost_base = {**good, "pretrained_model_name_or_path": str(tmp_path)}
    endings: list[Ending] = []
    todo = [
        (Subject("a", error="no such folder"), ""),
        (Subject("b", lost_base), "m"),
        (Subject("c", good), "m"),
    ]
    tasks = list(build_tasks(todo, tmp_path, Machines(None, 9.0), endings.append))
    assert [task.key for task in tasks] == ["c"] and [ending.name for ending in endings] == [
        "a",
        "b",
    ]
    assert (
        read_record(tmp_path / "a").message == "no such folder"
        and endings[1].record.state == "failed"
    )


def test_an_adapter_that_is_not_here_is_no_success(tmp_path):
    assert (
        "must be a folder that all machines share"
        in fleet.check_result(tmp_path / "rex", Record("done", "m")).message
    )
    assert (
        fleet.check_result(tmp_path / "rex", LostTask("its machine was lost")).message
        == "its machine was lost"
    )
    assert json.loads((tmp_path / "rex" / "fleet.json").read_text())["state"] == "failed"


def test_one_fleet_holds_a_folder_and_ignores_an_old_stop(tmp_path):
    get_stop_path(tmp_path).touch()
    with fleet.lock_fleet(tmp_path, [Subject("rex")]):
        assert read_names(tmp_path) == ["rex"] and not get_stop_path(tmp_path).exists()
        get_stop_path(tmp_path).touch()
        with (
            pytest.raises(UserError, match=r"--out .* is training there"),
            fleet.lock_fleet(tmp_path, []),
        ):
            pass
        assert read_names(tmp_path) == ["rex"] and get_stop_path(tmp_path).exists()
    assert not get_stop_path(tmp_path).exists()


def rex(folder: Path, **settings) -> Job:
    return Job(str(folder / "rex"), settings, "mark")


def test_a_stopping_fleet_starts_none_and_repeats_none(tmp_path):
    job = rex(tmp_path)
    get_stop_path(tmp_path).touch()
    assert train_subject(job).state == "interrupted" and not (tmp_path / "rex" / "job.log").exists()
    get_stop_path(tmp_path).unlink()
    write_record(tmp_path / "rex", done := Record("done", "mark", starts=1))
    (tmp_path / "rex" / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    assert train_subject(job) == done


def test_a_folder_of_another_training_is_waited_for_then_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "LOCK_TIMEOUT_SEC", 0.3)
    (tmp_path / "rex").mkdir()
    with lock_folder(tmp_path / "rex"):
        record = train_subject(rex(tmp_path))
    assert record.state == "failed" and "is training there" in record.message


def test_a_training_holds_its_folder_without_its_worker(tmp_path):
    job, run = rex(tmp_path, rank=0), tmp_path / "rex"
    run.mkdir()
    write_settings(run, job.settings)
    with worker.lock_folder(run) as hold:
        training = worker.start_guarded(
            job, ("train", "--config", str(run / "job_config.json")), (hold.fileno(),)
        )
    with pytest.raises(UserError, match="is training there"):
        claim_lock(run / worker.HOLD_NAME, "--out")
    training.wait()
    claim_lock(run / worker.HOLD_NAME, "--out").close()


@pytest.mark.parametrize(
    ("code", "log", "state", "message"),
    [
        (0, "error: of an earlier start\n", "done", ""),
        (130, "", "interrupted", ""),
        (2, "error: old\nerror: no usable photo\nleaked semaphores\n", "failed", "no usable photo"),
        (
            -9,
            "step 3\n",
            "failed",
            "The process was killed, perhaps for want of memory; its last words: step 3",
        ),
        (1, "Traceback\nZeroDivisionError: ours\n", "failed", "ZeroDivisionError: ours"),
    ],
)
def test_each_ending_has_its_line(code, log, state, message, tmp_path):
    (tmp_path / "rex").mkdir()
    (tmp_path / "rex" / "job.log").write_text(log)
    record = record_exit(tmp_path / "rex", code)
    assert (record.state, record.message) == (state, message) and read_record(
        tmp_path / "rex"
    ) == record


@pytest.mark.parametrize("clock_sec", [0, -3600])
def test_a_training_killed_while_loading_resumes_no_earlier_run(tmp_path, monkeypatch, clock_sec):
    """It went on from the last checkpoint of the run with other photos, and was done at once; and
    began anew where the clock was set back."""
    (script := tmp_path / "killed.py").write_text(
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    monkeypatch.setattr(worker, "GUARD_COMMAND", (str(script),))
    job, run = rex(tmp_path), RunDir(tmp_path / "rex")
    run.record_event(build_record(RunStarted(2)))
    write_record(run.path, Record("done", "of other photos", starts=1))
    for is_its_own in (False, True):
        assert train_subject(job).state == "failed"
        settings = json.loads((run.path / JOB_CONFIG_NAME).read_text())
        assert settings == ({"resume_from_checkpoint": "latest"} if is_its_own else {})
        began = build_record(RunStarted(2))
        run.record_event(began | {"time": began["time"] + clock_sec})


def test_a_mistake_is_the_subjects_own_line(tmp_path):
    record = train_subject(
        rex(tmp_path, pretrained_model_name_or_path="toy", instance_prompt="x", rank=0)
    )
    assert record.state == "failed" and record.message.startswith("--rank 0") and record.starts == 1
