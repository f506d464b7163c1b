"""What a fleet gives to its machines and takes from them, without a cluster: one subject, or
several of one process."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from dreambooth_moslora.disk.events import RunStarted, record_of
from dreambooth_moslora.disk.processes import CONFIG_NAME, write_settings
from dreambooth_moslora.disk.queue import locked, take
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.cluster import fleet, worker
from dreambooth_moslora.extras.cluster.fleet import Ending, GroupsUnderWay, Machines, tasks_of
from dreambooth_moslora.extras.cluster.fleet_subjects import Subject
from dreambooth_moslora.extras.cluster.ray_fleet import Lost, Resources, Task
from dreambooth_moslora.extras.cluster.records import (
    Record,
    read_names,
    read_record,
    stop_path,
    write_record,
)
from dreambooth_moslora.extras.cluster.worker import Group, Job, judged, train_subject, train_work
from dreambooth_moslora.plan.memory import BaseSize, estimate
from dreambooth_moslora.settings.table import TrainConfig
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config

CONFIG = TrainConfig(
    pretrained_model_name_or_path="someone/sdxl", resolution=1024, mixed_precision="bf16"
)
NEED = estimate(CONFIG, BaseSize(), 1).peak_gib


def test_a_training_takes_the_part_of_a_gpu_that_it_needs_and_so_many_share_one_as_are_estimated():
    assert (
        Machines(80.0, 500.0).resources_for(CONFIG).gpus
        == int(10_000 / int(0.9 * 80 / NEED)) / 10_000
    )
    assert Machines(8.0, 500.0).resources_for(CONFIG).gpus == 1.0
    assert Machines(80.0, 500.0, per_gpu=2).resources_for(CONFIG).gpus == 0.5
    three = Machines(80.0, 500.0, per_gpu=3).resources_for(CONFIG).gpus
    assert 3 * three <= 1 < 4 * three
    config = replace(CONFIG, rank=16, train_batch_size=1)
    assert [Machines(gib, 99.0, per_gpu=8).at_once(config) for gib in (8.0, 24.0, 80.0, None)] == [
        1,
        2,
        8,
        8,
    ]


def test_without_a_gpu_it_takes_cores_and_memory_that_there_are_and_a_group_less_than_each_alone():
    roomy, narrow = (Machines(None, gib, cpus=2).resources_for(CONFIG) for gib in (500.0, 3.0))
    assert (roomy.cpus, roomy.gpus) == (2, 0.0) and roomy.memory_gib == pytest.approx(
        NEED + fleet.PROCESS_GIB
    )
    assert narrow.memory_gib == 3.0
    config, machines = tiny_config(Path("toy"), Path("."), Path("x")), Machines(None, 999.0)
    one, four = (
        machines.resources_for(config).memory_gib,
        machines.resources_for_group(config, 4).memory_gib,
    )
    assert one < four < 4 * one


def test_one_word_for_the_memory_means_the_same_on_all_machines(tmp_path):
    settings = {**CONFIG.to_dict(), "memory": "auto", "instance_data_dir": str(tmp_path)}
    todo = [(Subject("rex", settings), "mark")]
    for gib, plan in ((80.0, "full"), (8.5, "recompute")):
        (task,) = tasks_of(todo, tmp_path, Machines(gib, 99.0), print)
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
    tasks = list(tasks_of(todo, tmp_path, Machines(None, 9.0), endings.append))
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
        in fleet.checked(tmp_path / "rex", Record("done", "m")).message
    )
    assert (
        fleet.checked(tmp_path / "rex", Lost("its machine was lost")).message
        == "its machine was lost"
    )
    assert json.loads((tmp_path / "rex" / "fleet.json").read_text())["state"] == "failed"


def test_one_fleet_at_a_time_holds_a_folder_and_begins_without_an_old_stop(tmp_path):
    stop_path(tmp_path).touch()
    with fleet.begun(tmp_path, [Subject("rex")]):
        assert read_names(tmp_path) == ["rex"] and not stop_path(tmp_path).exists()
        stop_path(tmp_path).touch()
        with (
            pytest.raises(UserError, match=r"--out .* is training there"),
            fleet.begun(tmp_path, []),
        ):
            pass
        assert read_names(tmp_path) == ["rex"] and stop_path(tmp_path).exists()
    assert not stop_path(tmp_path).exists()


def tasks(folder: Path, changes: list[dict], machines: Machines, room: int) -> list[Task]:
    settings = {
        "pretrained_model_name_or_path": "toy",
        "instance_data_dir": str(folder),
        "instance_prompt": "x",
    }
    todo = [(Subject(f"s{n}", settings | own), f"m{n}") for n, own in enumerate(changes)]
    return list(
        fleet.grouped(
            tasks_of(todo, folder, machines, print), machines, len(todo), lambda needs: room
        )
    )


def test_subjects_of_one_shape_are_put_together_and_spread_over_the_machines_and_others_train_alone(
    tmp_path,
):
    prior = {"with_prior_preservation": True, "class_prompt": "x", "prior_every": 2}
    changes = [
        {},
        {"rank": 8},
        {"use_dora": True},
        {"seed": 5},
        {"rank": 8},
        {},
        {"enable_bucket": True},
        prior,
    ]
    found = tasks(tmp_path, changes, Machines(80.0, 99.0, per_gpu=2), room=1)
    assert [task.key for task in found] == ["s2", "s6", "s7", ("s0", "s3", "s5"), ("s1", "s4")]
    group = found[3].arguments[0]
    assert group.at_once == 2 and [job.mark for job in group.jobs] == ["m0", "m3", "m5"]
    assert found[3].resources == Resources(1, gpus=1.0) and {job.gpus for job in group.jobs} == {
        1.0
    }
    sizes = [
        len(t.key) for t in tasks(tmp_path, [{}] * 12, Machines(None, 99.0, per_gpu=2), room=3)
    ]
    assert sizes == [4, 4, 4]
    assert len(tasks(tmp_path, [{}] * 40, Machines(None, 99.0, per_gpu=2), room=1)[0].key) == 16
    alone = tasks(tmp_path, [{}] * 3, Machines(None, 99.0), room=1)
    assert [task.key for task in alone] == ["s0", "s1", "s2"]


def group_in(folder: Path) -> Task:
    for name in "abc":
        (folder / name).mkdir()
    return Task(
        ("a", "b", "c"), (Group(tuple(Job(str(folder / name), {}, "m") for name in "abc"), 2),)
    )


def test_of_a_lost_group_those_that_were_done_are_done(tmp_path):
    task, groups, lost = group_in(tmp_path), GroupsUnderWay(print), Lost("its machine was lost")
    write_record(tmp_path / "a", done := Record("done", "m", starts=1))
    (tmp_path / "a" / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    assert list(groups.noted([task])) == [task]
    assert groups.untold(task, lost) == [("a", done), ("b", lost), ("c", lost)]


def test_each_subject_of_a_group_is_told_once_as_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(fleet, "LOOK_SEC", 0)
    task = group_in(tmp_path)
    write_record(tmp_path / "c", failed := Record("failed", "m", "of the last time", starts=1))
    told = []
    groups = GroupsUnderWay(lambda name, record: told.append((name, record.state)))
    assert list(groups.noted([task])) == [task]
    write_record(tmp_path / "b", Record("done", "of other settings", starts=1))
    groups.look()
    assert not told
    write_record(tmp_path / "b", done := Record("done", "m", starts=1))
    groups.look()
    groups.look()
    assert told == [("b", "done")]
    assert [name for name, _ in groups.untold(task, [failed, done, failed])] == ["a", "c"]


def kill_at_a_checkpoint(out: Path) -> None:
    """The process of the group, as the system would for want of memory."""
    while not list(out.glob("*/checkpoint-2")):
        time.sleep(0.02)
    for child in psutil.Process().children(recursive=True):
        if "together" in child.cmdline():
            os.kill(child.pid, signal.SIGKILL)


def test_a_group_that_ends_by_an_error_of_its_own_is_not_started_again(tmp_path, monkeypatch):
    codes = []
    monkeypatch.setattr(worker, "train_group_once", lambda *_: codes.append(1) or 1)
    records = train_work(Group((Job(str(tmp_path / "out" / "a"), {}, "m"),), at_once=1))
    assert codes == [1] and [record.state for record in records] == ["failed"]


@pytest.mark.slow
def test_a_group_that_is_killed_goes_on_and_a_bad_subject_fails_alone(
    tiny_base, tmp_path, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    good = {"max_train_steps": 12, "checkpointing_steps": 1, "checkpoints_total_limit": 2}
    jobs, out = [], tmp_path / "out"
    for number, own in enumerate((good, {"rank": 4}, good | {"seed": 4})):
        photos = paint_photos(tmp_path / "photos" / str(number), number + 2)
        settings = tiny_config(tiny_base, photos, out / str(number), **own).to_dict()
        jobs.append(Job(str(out / str(number)), settings, f"mark {number}"))
    for photo in (tmp_path / "photos" / "1").iterdir():
        photo.unlink()
    threading.Thread(target=kill_at_a_checkpoint, args=(out,), daemon=True).start()
    records = train_work(Group(tuple(jobs), at_once=3))
    assert [record.state for record in records] == ["done", "failed", "done"]
    assert "no usable photo" in records[1].message and records[0].starts == records[2].starts == 2
    assert records[0].seconds > 0 and records[0].unit == "CPU"
    for name in ("0", "2"):
        events = RunDir(out / name).read_metrics()
        assert [event["step"] for event in events if event["type"] == "step"] == list(range(1, 13))
        log = RunDir(out / name).log_path.read_text(encoding="utf-8")
        assert "no usable photo" not in log and len(log.splitlines()) == len(set(log.splitlines()))
    before = adapter_sha256(out / "0")
    (out / "0" / CONFIG_NAME).unlink()
    assert train_work(Group((jobs[0],), at_once=2))[0].state == "done"
    assert adapter_sha256(out / "0") == before and not (out / "0" / CONFIG_NAME).exists()


def rex(folder: Path, **settings) -> Job:
    return Job(str(folder / "rex"), settings, "mark")


def test_a_fleet_that_stops_begins_none_and_what_is_done_is_not_trained_again(tmp_path):
    job = rex(tmp_path)
    stop_path(tmp_path).touch()
    assert train_subject(job).state == "interrupted" and not (tmp_path / "rex" / "job.log").exists()
    stop_path(tmp_path).unlink()
    write_record(tmp_path / "rex", done := Record("done", "mark", starts=1))
    (tmp_path / "rex" / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    assert train_subject(job) == done


def test_a_folder_that_another_training_holds_is_waited_for_and_then_a_failure(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(worker, "HELD_SEC", 0.3)
    (tmp_path / "rex").mkdir()
    with locked(tmp_path / "rex"):
        record = train_subject(rex(tmp_path))
    assert record.state == "failed" and "is training there" in record.message


def test_a_training_holds_its_folder_from_before_its_start_and_without_its_worker(tmp_path):
    job, run = rex(tmp_path, rank=0), tmp_path / "rex"
    run.mkdir()
    write_settings(run, job.settings)
    with worker.held(run) as hold:
        training = worker.start_guarded(
            job, ("train", "--config", str(run / "job_config.json")), (hold.fileno(),)
        )
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
        (
            -9,
            "step 3\n",
            "failed",
            "The process was killed by SIGKILL, perhaps for want of memory.",
        ),
        (1, "Traceback\nZeroDivisionError: ours\n", "failed", "ZeroDivisionError: ours"),
    ],
)
def test_each_ending_has_its_line(code, log, state, message, tmp_path):
    (tmp_path / "rex").mkdir()
    (tmp_path / "rex" / "job.log").write_text(log)
    record = judged(tmp_path / "rex", code)
    assert (record.state, record.message) == (state, message) and read_record(
        tmp_path / "rex"
    ) == record


@pytest.mark.parametrize(
    "train", [train_subject, lambda job: train_work(Group((job,), at_once=1))[0]]
)
def test_a_training_that_was_killed_before_it_took_the_folder_resumes_no_earlier_run(
    train, tmp_path, monkeypatch
):
    """It went on from the last checkpoint of the run with other photos, and was done at once."""
    (script := tmp_path / "killed.py").write_text(
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    monkeypatch.setattr(worker, "GUARDED", (str(script),))
    job, run = rex(tmp_path), RunDir(tmp_path / "rex")
    run.append_metrics(record_of(RunStarted(2)))
    write_record(run.path, Record("done", "of other photos", starts=1))
    for is_its_own in (False, True):
        assert train(job).state == "failed"
        # a group's process counts them itself
        write_record(run.path, replace(read_record(run.path), starts=3))
        assert train(job).state == "failed"
        settings = json.loads((run.path / CONFIG_NAME).read_text())
        assert settings == ({"resume_from_checkpoint": "latest"} if is_its_own else {})
        run.append_metrics(record_of(RunStarted(2)))


def test_a_mistake_is_the_subjects_own_line(tmp_path):
    record = train_subject(
        rex(tmp_path, pretrained_model_name_or_path="toy", instance_prompt="x", rank=0)
    )
    assert record.state == "failed" and record.message.startswith("--rank 0") and record.starts == 1
