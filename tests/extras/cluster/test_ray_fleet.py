"""A fleet and a study on Ray for real, on this machine: nothing lost with a worker, and the same
results as without."""

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from dreambooth_moslora.extras.cluster.fleet import (
    Ending,
    Machines,
    list_unfinished,
    lock_fleet,
    run_fleet,
)
from dreambooth_moslora.extras.cluster.fleet_subjects import PATH_SETTINGS, Subject, read_subjects
from dreambooth_moslora.extras.cluster.ray_fleet import LostTask, Task, connect, run_tasks
from dreambooth_moslora.extras.cluster.records import get_stop_path, read_record
from dreambooth_moslora.extras.lab.study import Protocol, Study, StudySubject
from tests.helpers.tiny_encoders import save_tiny_encoders
from tests.helpers.tiny_training import (
    adapter_sha256,
    paint_photos,
    tiny_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.extra("ray")]
GUARDED = "dreambooth_moslora.extras.cluster.worker"


@pytest.fixture(scope="module")
def machines():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with connect(None):
            yield Machines.from_cluster()


def trainings_of(run_dir: Path) -> list[psutil.Process]:
    """The processes that a fleet's workers have begun in such a run folder."""
    trainings = []
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or [""]
        if GUARDED in arguments and arguments[-1].endswith(f"{run_dir}/job_config.json"):
            trainings.append(process)
    return trainings


def worker_of(training: psutil.Process) -> psutil.Process:
    arguments = training.cmdline()
    return psutil.Process(int(arguments[arguments.index(GUARDED) + 1]))


def kill_a_worker(out: Path) -> None:
    """The first that trains, as a lost machine would go; its training is left an orphan."""
    while not (trainings := trainings_of(out / "rex") + trainings_of(out / "tom")):
        time.sleep(0.05)
    worker_of(trainings[0]).kill()


def subjects_of(base: Path, home: Path, counts: dict[str, int], **changes) -> list[Subject]:
    """A fleet in `home`/out, with so many photos of each."""
    for name, count in counts.items():
        paint_photos(home / "photos" / name, count)
    settings = tiny_config(base, Path("a"), Path("b"), **changes).to_dict()
    shared = {name: value for name, value in settings.items() if name not in PATH_SETTINGS}
    return read_subjects(home / "photos", shared, home / "out")


def test_a_fleet_that_lost_a_worker_equals_trainings_without_ray(machines, tiny_base, tmp_path):
    from dreambooth_moslora.training.loop import train

    out, often = tmp_path / "out", {"checkpointing_steps": 1, "checkpoints_total_limit": 2}
    (tmp_path / "photos" / "void").mkdir(parents=True)
    (tmp_path / "photos" / "void" / "subject.json").write_text("{")
    subjects = subjects_of(tiny_base, tmp_path, {"rex": 2, "tom": 3}, max_train_steps=40, **often)
    stopped = ended(out, subjects, machines, lambda: bool(list(out.glob("*/checkpoint-[3-9]"))))
    assert "interrupted" in stopped.values() and not get_stop_path(out).exists()
    threading.Thread(target=kill_a_worker, args=(out,), daemon=True).start()
    states = ended(out, subjects, machines, bool)
    assert states == {"rex": "done", "tom": "done", "void": "failed", "again": "running"}
    assert "not valid JSON" in read_record(out / "void").message
    assert sum(read_record(out / name).starts for name in ("rex", "tom")) >= 4
    for name in ("rex", "tom"):
        train(
            tiny_config(
                tiny_base, tmp_path / "photos" / name, tmp_path / "alone" / name, max_train_steps=40
            )
        )
        assert adapter_sha256(out / name) == adapter_sha256(tmp_path / "alone" / name)
    assert [subject.name for subject, _ in list_unfinished(out, subjects)] == ["void"]


def ended(
    out: Path, subjects: list, machines: Machines, should_stop: Callable[[], bool]
) -> dict[str, str]:
    """{subject: its state}; `again` is one whose worker was lost."""
    states = {}

    def note(ending: Ending) -> None:
        states["again" if ending.is_retry else ending.name] = ending.record.state

    with lock_fleet(out, subjects):
        run_fleet(list_unfinished(out, subjects), out, machines, note, should_stop)
    return states


def fail(kind: str) -> str:
    if kind == "raises":
        raise ZeroDivisionError("ours")
    if kind == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    return kind


def test_a_failing_task_stops_no_other(machines):
    again = []
    tasks = [Task(kind, (kind,)) for kind in ("raises", "dies", "well")]
    results = run_tasks(fail, tasks, retries=1, on_retry=lambda task, why: again.append(task.key))
    results_by_key = {task.key: result for task, result in results}
    assert results_by_key == {
        "raises": LostTask("ZeroDivisionError: ours"),
        "dies": LostTask("its worker was killed"),
        "well": "well",
    }
    assert again == ["dies"]


def test_a_study_has_the_same_results_on_ray(machines, tiny_base, tmp_path):
    from dreambooth_moslora.extras.lab.run import run_cells_on_cluster, run_study

    clip, dino = save_tiny_encoders(tmp_path / "encoders")
    subject = StudySubject(str(paint_photos(tmp_path / "dog")), "a photo of sks dog")
    train = {
        "pretrained_model_name_or_path": str(tiny_base),
        "resolution": 64,
        "max_train_steps": 2,
    }
    arms = {"lora": {"mixer": "none"}, "odd": {"mixer": "butterfly", "rank": 3}}
    protocol = {
        "num_prompts": 1,
        "images_per_prompt": 1,
        "class_images": 1,
        "unrelated": 1,
        "inference_steps": 2,
    }
    shape = {"seeds": (0,), "ranks": (3,), "budget": "rank", "learning_rates": (1e-3,)}
    protocol = Protocol(**protocol, clip=str(clip), dino=str(dino))
    study = Study((subject,), arms, {**train, "train_batch_size": 1}, **shape, protocol=protocol)
    kept_options = []
    (result,) = run_study(
        study,
        tmp_path / "ray",
        1,
        kept_options.append,
        partial(run_cells_on_cluster, machines, None),
    )
    assert sorted(bool(progress.error) for progress in kept_options) == [False, True]
    (alone,) = run_study(study, tmp_path / "alone", 1, print)
    assert result.scores == alone.scores and result.pictures == alone.pictures
