"""The adapter of a run's best step can be chosen, and both files of a run can be downloaded."""

import json
import os
from pathlib import Path
from zipfile import ZipFile

import PIL.Image
import psutil
import pytest

from dreambooth_moslora.ui.jobs import Job, Jobs
from dreambooth_moslora.ui.state import AdapterCatalog
from dreambooth_moslora.ui.train_form import in_the_forms_words
from dreambooth_moslora.ui.train_watch import watched
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
    assert not now["download_tokens"].visible and not now["sheet"].visible
    values = [str(now[name].value) for name in ("download", "download_kohya")]
    assert PUBLISHED in values[0] and "dog.kohya.safetensors" in values[1]


def test_new_tokens_and_the_contact_sheet_are_offered_where_the_run_made_them(run, tmp_path):
    (run / "dog_emb.safetensors").write_text("tokens")
    PIL.Image.new("RGB", (8, 8)).save(run / "contact_sheet.png")
    now = watched(Jobs(tmp_path / "runs"), "dog", None, visitor(tmp_path))
    assert now["download_tokens"].visible and "dog_emb.safetensors" in str(now["download_tokens"].value)
    assert now["sheet"].visible and "contact_sheet.png" in str(now["sheet"].value)
    (run / "dog_2_emb.safetensors").write_text("of the second")
    for _ in range(2):
        both = watched(Jobs(tmp_path / "runs"), "dog", None, visitor(tmp_path))["download_tokens"]
        with ZipFile(str(both.value["path"])) as archive:
            assert archive.namelist() == ["dog_emb.safetensors", "dog_2_emb.safetensors"]
            assert archive.read("dog_2_emb.safetensors") == b"of the second"


def test_mixers_on_a_basis_are_offered_beside_the_published_files(run, tmp_path):
    assert not watched(Jobs(tmp_path / "runs"), "dog", None, visitor(tmp_path))["download_mixers"].visible
    (run / "mixers.safetensors").write_text("mixers")
    offered = watched(Jobs(tmp_path / "runs"), "dog", None, visitor(tmp_path))["download_mixers"]
    assert offered.visible and Path(str(offered.value["path"])).read_text() == "mixers"


@pytest.mark.parametrize(
    "advice, words",
    [
        (
            "too short: try --exposures_per_photo 200, and x",
            "too short: try a greater “Length”, or more “Steps”, and x",
        ),
        ("try --crops_per_photo 8, or fewer steps (--max_train_steps 66)", "8, or fewer steps (“Steps” 66)"),
        ("try --learning_rate 3e-05 (it was 0.0001)", "try “Learning rate” 3e-05 (it was 0.0001)"),
        ('try --with_prior_preservation --prior adapter_off --class_prompt "a dog"', "try “Keep the class”"),
        ("try --prior_loss_weight 2.5", "try “Prior weight” 2.5"),
        ("try --unmasked_weight 0, and captions", "try 0 as “Weight outside the mask”, and captions"),
        ("add masks: --masks auto", "add masks: “Make masks”"),
    ],
)
def test_advice_names_what_the_form_has_and_not_the_flag(advice, words):
    assert in_the_forms_words(advice).endswith(words)


def test_of_several_subjects_each_likeness_and_the_confusion_are_shown_and_whom_a_picture_shows(run, tmp_path):
    scores = {"dino": 0.6, "dino_subject_1": 0.7, "dino_subject_2": 0.5, "confusion": 0.07, "clip_t": 0.3}
    drawn = {
        "files": ["samples/a.png", "samples/b.png"],
        "prompts": ["a photo of a sks duck", "a photo of a zwx rocket"],
    }
    events = [
        {"type": "start", "max_train_steps": 30},
        {"type": "sample", "step": 0, **drawn},
        {"type": "evaluation", "step": 30, "score": 0.5, **scores},
    ]
    (run / "samples").mkdir()
    for name in drawn["files"]:
        PIL.Image.new("RGB", (8, 8)).save(run / name)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"time": 1e12, **event}) + "\n" for event in events))
    jobs, ann = Jobs(tmp_path / "runs"), visitor(tmp_path)
    now = watched(jobs, "dog", None, ann)
    assert "Confusion of the subjects: 0.07" in now["status"]
    assert "Likeness: 0.70 of subject 1, 0.50 of subject 2." in now["status"]
    assert {row[2] for row in now["fidelity"].value["data"]} == {"1", "2", "score", "confusion"}
    assert [sample["caption"] for sample in now["samples"].value] == ["step 0 · sks duck", "step 0 · zwx rocket"]


def test_a_run_without_scores_or_a_kohya_file_offers_neither(run, tmp_path):
    (run / "dog.kohya.safetensors").unlink()
    (run / "metrics.jsonl").write_text(json.dumps({"type": "end", "state": "done", "time": 1e12}) + "\n")
    now = watched(Jobs(tmp_path / "runs"), "dog", None, visitor(tmp_path))
    assert now["download"].visible and not now["download_kohya"].visible and "@best" not in now["status"]
    assert "Try next" not in now["status"]
