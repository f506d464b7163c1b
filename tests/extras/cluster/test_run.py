"""What a fleet gives to its machines and what it takes from them, without a cluster; and one worker's training."""

import json
from dataclasses import replace

import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.extras.cluster.command_fleet import FleetProgress
from dreambooth_moslora.extras.cluster.fleet import PROCESS_GIB, Ending, Machines, begun, checked, tasks_of
from dreambooth_moslora.extras.cluster.on_ray import Lost
from dreambooth_moslora.extras.cluster.records import Record, read_names, read_record, stop_path
from dreambooth_moslora.extras.cluster.subjects import Subject
from dreambooth_moslora.plan.memory import BaseSize, estimate
from dreambooth_moslora.settings.table import TrainConfig

CONFIG = TrainConfig(pretrained_model_name_or_path="someone/sdxl", resolution=1024, mixed_precision="bf16")
NEED = estimate(CONFIG, BaseSize(), 1).peak_gib


def test_a_training_takes_the_part_of_a_gpu_that_it_needs():
    assert Machines(80.0, 500.0).resources_for(CONFIG).gpus == int(10_000 / int(0.9 * 80 / NEED)) / 10_000
    assert Machines(8.0, 500.0).resources_for(CONFIG).gpus == 1.0
    assert Machines(80.0, 500.0, per_gpu=2).resources_for(CONFIG).gpus == 0.5
    three = Machines(80.0, 500.0, per_gpu=3).resources_for(CONFIG).gpus
    assert 3 * three <= 1 < 4 * three


def test_without_a_gpu_it_takes_cores_and_memory_and_never_more_than_there_is():
    roomy, narrow = (Machines(None, gib, cpus=2).resources_for(CONFIG) for gib in (500.0, 3.0))
    assert (roomy.cpus, roomy.gpus) == (2, 0.0) and roomy.memory_gib == pytest.approx(NEED + PROCESS_GIB)
    assert narrow.memory_gib == 3.0


def test_one_word_for_the_memory_means_the_same_on_all_machines(tmp_path):
    settings = {**CONFIG.to_dict(), "memory": "auto", "instance_data_dir": str(tmp_path)}
    todo = [(Subject("rex", settings), "mark")]
    for gib, plan in ((80.0, "full"), (8.5, "recompute")):
        (task,) = tasks_of(todo, tmp_path, Machines(gib, 99.0), print)
        assert task.arguments[0].settings["memory"] == plan


def test_a_subject_that_cannot_be_trained_ends_alone(tmp_path):
    good = {"pretrained_model_name_or_path": "toy", "instance_data_dir": str(tmp_path), "instance_prompt": "x"}
    lost_base = {**good, "pretrained_model_name_or_path": str(tmp_path)}
    endings: list[Ending] = []
    todo = [(Subject("a", error="no such folder"), ""), (Subject("b", lost_base), "m"), (Subject("c", good), "m")]
    tasks = list(tasks_of(todo, tmp_path, Machines(None, 9.0), endings.append))
    assert [task.key for task in tasks] == ["c"] and [ending.name for ending in endings] == ["a", "b"]
    assert read_record(tmp_path / "a").message == "no such folder" and endings[1].record.state == "failed"


def test_an_adapter_that_is_not_here_is_no_success(tmp_path):
    assert "must be a folder that all machines share" in checked(tmp_path / "rex", Record("done", "m")).message
    assert checked(tmp_path / "rex", Lost("its machine was lost")).message == "its machine was lost"
    assert json.loads((tmp_path / "rex" / "fleet.json").read_text())["state"] == "failed"


def test_the_progress_tells_time_cost_and_failures(capsys):
    now = iter([0.0, 60.0, 120.0, 180.0])
    progress = FleetProgress(5, 4, clock=lambda: next(now))
    done = Record("done", seconds=59.0, hours=0.5, unit="GPU")
    progress(Ending("rex", done))
    progress(Ending("tom", Record("running", message="its machine was lost"), is_again=True))
    progress(Ending("tom", replace(done, state="failed", message="no photo", hours=0.0)))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "2/5 rex: 59 s; about 3 min left, 0.50 GPU-hours spent"
    assert lines[1] == "tom: its machine was lost; it continues elsewhere"
    assert lines[2].startswith("2/5 tom: FAILED: no photo; about 2 min left") and progress.failed == 1


def test_one_fleet_at_a_time_holds_a_folder_and_begins_without_an_old_stop(tmp_path):
    stop_path(tmp_path).touch()
    with begun(tmp_path, [Subject("rex")]):
        assert read_names(tmp_path) == ["rex"] and not stop_path(tmp_path).exists()
        stop_path(tmp_path).touch()
        with pytest.raises(UserError, match=r"--out .* is training there"), begun(tmp_path, []):
            pass
        assert read_names(tmp_path) == ["rex"] and stop_path(tmp_path).exists()
    assert not stop_path(tmp_path).exists()
