"""A fleet and a study on Ray for real, on this machine: nothing lost with a worker, and the same results as without."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from dreambooth_moslora.evaluation.study import Protocol, Study, StudySubject
from dreambooth_moslora.fleet.cells import CellRunner
from dreambooth_moslora.fleet.cluster import Lost, Task, connected, largest_node_gib, run_tasks
from dreambooth_moslora.fleet.records import stop_path
from dreambooth_moslora.fleet.run import begin_fleet, missing, run_fleet
from dreambooth_moslora.fleet.sizing import Machines
from dreambooth_moslora.fleet.subjects import read_subjects
from tests.helpers.tiny_encoders import save_tiny_encoders
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config

pytest.importorskip("ray", reason='Ray is not installed: pip install "dreambooth_moslora[fleet]"')
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def machines():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with connected(None):
            yield Machines(None, largest_node_gib())


def kill_worker_once(out: Path) -> None:
    """The worker of the first training that has made a step, as a lost machine would."""
    while not list(out.glob("*/checkpoint-1")):
        time.sleep(0.05)
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "dreambooth_moslora.fleet.guarded" in words and str(out) in " ".join(words):
            psutil.Process(int(words[words.index("dreambooth_moslora.fleet.guarded") + 1])).kill()
            return


def test_a_fleet_loses_nothing_with_a_worker_and_ends_equal_to_trainings_without_ray(machines, tiny_base, tmp_path):
    from dreambooth_moslora.training.loop import train

    out, photos = tmp_path / "out", tmp_path / "photos"
    for name in ("rex", "tom"):
        paint_photos(photos / name, count=2 + len(name) % 2)
    (photos / "empty").mkdir()
    config = tiny_config(tiny_base, photos / "rex", out, max_train_steps=6, checkpointing_steps=1)
    own = ("instance_data_dir", "output_dir")
    shared = {name: value for name, value in config.to_dict().items() if name not in own}
    subjects, endings = read_subjects(photos, shared, out), []
    begin_fleet(out, subjects)
    killer = threading.Thread(target=kill_worker_once, args=(out,), daemon=True)
    killer.start()
    run_fleet(missing(out, subjects), out, machines, endings.append)
    assert sum(ending.is_again for ending in endings) == 1
    states = {ending.name: ending.record for ending in endings if not ending.is_again}
    assert {name: record.state for name, record in states.items()} == {"empty": "failed", "rex": "done", "tom": "done"}
    assert "no usable photo" in states["empty"].message and states["rex"].starts + states["tom"].starts == 3
    for name in ("rex", "tom"):
        alone = tiny_config(tiny_base, photos / name, tmp_path / "alone" / name, max_train_steps=6)
        train(alone)
        assert adapter_sha256(out / name) == adapter_sha256(tmp_path / "alone" / name)
    assert [subject.name for subject, _ in missing(out, subjects)] == ["empty"] and not stop_path(out).exists()


def fail(kind: str) -> str:
    if kind == "raises":
        raise ZeroDivisionError("ours")
    if kind == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    return kind


def test_a_task_that_raises_or_always_kills_its_worker_stops_no_other(machines):
    again = []
    tasks = [Task(kind, (kind,)) for kind in ("raises", "dies", "well")]
    found = dict(
        (task.key, result)
        for task, result in run_tasks(fail, tasks, retries=1, on_retry=lambda task, why: again.append(task.key))
    )
    assert found == {"raises": Lost("ZeroDivisionError: ours"), "dies": Lost("its worker was killed"), "well": "well"}
    assert again == ["dies"]


def test_a_study_has_the_same_results_on_ray(machines, tiny_base, tmp_path):
    from dreambooth_moslora.evaluation.study_run import run_study

    clip, dino = save_tiny_encoders(tmp_path / "encoders")
    subject = StudySubject(str(paint_photos(tmp_path / "dog")), "a photo of sks dog")
    train = {"pretrained_model_name_or_path": str(tiny_base), "resolution": 64, "max_train_steps": 2}
    arms = {"lora": {"mixer": "none"}, "odd": {"mixer": "butterfly", "rank": 3}}
    protocol = {"num_prompts": 1, "images_per_prompt": 1, "class_images": 1, "unrelated": 1, "inference_steps": 2}
    study = Study(
        (subject,),
        arms,
        {**train, "train_batch_size": 1},
        seeds=(0,),
        ranks=(3,),
        budget="rank",
        learning_rates=(1e-3,),
        protocol=Protocol(**protocol, clip=str(clip), dino=str(dino)),
    )
    seen = []
    (result,) = run_study(study, tmp_path / "ray", 1, seen.append, CellRunner(machines))
    assert sorted(bool(progress.error) for progress in seen) == [False, True]
    (alone,) = run_study(study, tmp_path / "alone", 1, print)
    assert result.scores == alone.scores and result.pictures == alone.pictures
