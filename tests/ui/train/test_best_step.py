"""The adapter of a run's best step can be chosen, and both files of a run can be downloaded."""

import json
import os

import psutil
import pytest

from dreambooth_moslora.ui.adapters.catalog import AdapterCatalog
from dreambooth_moslora.ui.jobs.job import Job
from dreambooth_moslora.ui.jobs.jobs import Jobs
from dreambooth_moslora.ui.train.watch import watched
from tests.ui.test_handlers import OWNER, visitor

PUBLISHED = "pytorch_lora_weights.safetensors"


@pytest.fixture
def run(tmp_path):
    """A run that has ended, scored on its way."""
    run = tmp_path / "runs" / "dog"
    for name in (PUBLISHED, "dog.kohya.safetensors", f"best/{PUBLISHED}", "best/dog.kohya.safetensors"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    Job(run, OWNER, os.getpid(), psutil.Process().create_time() - 100).save()
    events = [
        {"type": "start", "max_train_steps": 30},
        {"type": "evaluation", "step": 20, "score": 0.5, "best": {"step": 20, "score": 0.5, "since": 0}},
        {"type": "evaluation", "step": 30, "score": 0.4, "best": {"step": 20, "score": 0.5, "since": 1}},
        {"type": "end", "state": "done", "step": 30},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps({"time": 1e12, **event}) + "\n" for event in events))
    return run


def test_the_best_step_is_on_the_shelf_beside_the_last(run, tmp_path):
    catalog, ann = AdapterCatalog(tmp_path / "adapters", tmp_path / "runs"), visitor(tmp_path)
    assert catalog.files(ann) == {"dog": run / PUBLISHED, "dog@best": run / "best" / PUBLISHED}
    assert catalog.public_paths(ann)["dog@best"] == "runs/dog/best"
    assert not catalog.files()


def test_a_run_called_best_is_a_run(tmp_path):
    (tmp_path / "runs" / "best").mkdir(parents=True)
    (tmp_path / "runs" / "best" / PUBLISHED).write_text("x")
    assert list(AdapterCatalog(tmp_path / "adapters", tmp_path / "runs").files()) == ["best"]


def test_the_card_names_the_best_step_and_both_files_are_offered(run, tmp_path):
    now = watched(Jobs(tmp_path / "runs"), "dog", None, visitor(tmp_path))
    assert "step 20" in now["status"] and "dog@best" in now["status"]
    assert "Try next: the score fell from 0.50 at step 20" in now["status"]
    assert now["download"].visible and now["download_kohya"].visible
    values = [str(now[name].value) for name in ("download", "download_kohya")]
    assert PUBLISHED in values[0] and "dog.kohya.safetensors" in values[1]


def test_a_run_without_scores_or_a_kohya_file_offers_neither(run, tmp_path):
    (run / "dog.kohya.safetensors").unlink()
    (run / "metrics.jsonl").write_text(json.dumps({"type": "end", "state": "done", "time": 1e12}) + "\n")
    now = watched(Jobs(tmp_path / "runs"), "dog", None, visitor(tmp_path))
    assert now["download"].visible and not now["download_kohya"].visible and "@best" not in now["status"]
    assert "Try next" not in now["status"]
