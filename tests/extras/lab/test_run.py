"""A whole small study on the tiny base: trained, scored, reported, resumed."""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
from PIL import Image

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.load import load_pipeline
from dreambooth_moslora.extras.lab import budget, comparison, run
from dreambooth_moslora.extras.lab.comparison import CellResult
from dreambooth_moslora.extras.lab.run import list_unfinished, run_study
from dreambooth_moslora.extras.lab.study import Cell, Protocol, Study, StudySubject
from dreambooth_moslora.extras.lab.study_report import write_comparison
from dreambooth_moslora.method.moslora import list_adapter_parameters
from dreambooth_moslora.photos.synthetic import SyntheticRecord, write_record
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training.adapters import add_adapters
from tests.helpers.tiny_encoders import save_tiny_encoders
from tests.helpers.tiny_families import tiny_pipeline
from tests.helpers.tiny_training import paint_photos

pytestmark = pytest.mark.slow

PROTOCOL = {
    "num_prompts": 2,
    "images_per_prompt": 1,
    "class_images": 1,
    "unrelated": 1,
    "inference_steps": 2,
}


@pytest.fixture(scope="module")
def study(tiny_base, tmp_path_factory):
    home = tmp_path_factory.mktemp("study")
    clip, dino = save_tiny_encoders(home / "encoders")
    subjects = {
        name: StudySubject(str(paint_photos(home / name)), "a photo of sks dog")
        for name in ("test", "tune")
    }
    train = {
        "pretrained_model_name_or_path": str(tiny_base),
        "resolution": 64,
        "max_train_steps": 2,
    }
    return Study(
        (subjects["test"],),
        {"lora": {"mixer": "none"}, "mix": {"mixer": "orthogonal"}},
        {**train, "train_batch_size": 1},
        (subjects["tune"],),
        seeds=(0,),
        learning_rates=(1e-3, 1e-2),
        protocol=Protocol(**PROTOCOL, clip=str(clip), dino=str(dino)),
    )


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    out, progress = tmp_path_factory.mktemp("out"), []
    return out, run_study(study, out, 1, progress.append), progress


def test_every_cell_is_trained_scored_and_costed(finished):
    out, results, progress = finished
    assert [p.error for p in progress] == [""] * 6 and [p.done for p in progress] == [
        1,
        2,
        3,
        4,
        1,
        2,
    ]
    assert len(results) == 6 and not any((out / "running").iterdir())
    for result in results:
        assert {"score", "dino", "dino_bare", "clip_t", "pres", "drift"} <= result.scores.keys()
        assert result.cost["step_sec"] > 0 and result.cost["parameters"] > 0
        assert len(result.pictures["dino"]) == 2


def test_what_is_unfinished_is_known_without_training(study, finished, tmp_path):
    assert list_unfinished(study, finished[0]) == []
    assert list_unfinished(study, tmp_path) == study.list_tuning_cells()  # no rate is chosen yet
    tuned = shutil.copytree(finished[0], tmp_path / "tuned")
    for result in tuned.glob("cells/test-*.json"):
        result.unlink()
    assert {(cell.stage, cell.arm) for cell in list_unfinished(study, tuned)} == {
        ("test", "lora"),
        ("test", "mix"),
    }


def test_it_goes_on_where_it_stopped(study, finished):
    out, results, _ = finished
    stamps = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    progress = []
    assert run_study(study, out, 1, progress.append) == results and not progress
    victim = next((out / "cells").glob("test-mix-*.json"))
    victim.unlink()
    again = run_study(study, out, 1, progress.append)
    assert [p.cell.arm for p in progress] == ["mix"] and [p.done for p in progress] == [2]
    # the same seed gives the same scores
    assert [r.scores for r in again] == [r.scores for r in results]
    assert all(
        path.stat().st_mtime_ns == stamp
        for path, stamp in stamps.items()
        if path.stem != victim.stem
    )


def test_a_study_of_another_family_counts_its_layers(study, tmp_path, monkeypatch):
    tiny_pipeline("lumina2", tmp_path / "files").save_pretrained(tmp_path / "base")
    monkeypatch.setattr(Base, "resolution_px", 64)
    changes = {"pretrained_model_name_or_path": str(tmp_path / "base")}
    study = replace(study, train=study.train | changes, budget="parameters", ranks=(4,))
    cell = Cell("test", "mix", 4, study.subjects[0].name, 0, 1e-3)
    rank = budget.choose_ranks(study)["mix", 4]
    assert rank < 4 and run.run_cell(study, cell, rank, tmp_path, 1)[2] == ""
    (result,) = run.read_results(study, [cell], tmp_path)
    assert result.cost["rank"] == rank and result.cost["parameters"] > 0


def test_an_arm_of_references_is_in_the_same_table_and_sheet(study, tmp_path, monkeypatch):
    """Drawn first or after a training, it is the same, and the base's pictures are of nothing
    shown."""
    tiny_pipeline("flux2", tmp_path / "files").save_pretrained(tmp_path / "base")
    monkeypatch.setattr(Base, "resolution_px", 64)
    changes = {"pretrained_model_name_or_path": str(tmp_path / "base")}
    study_options = {"arms": {"lora": {"mixer": "none"}, "shown": {"by_references": True}}}
    study_options |= {"tuning_subjects": (), "learning_rates": (1e-2,), "ranks": (4,)}
    study = replace(study, train=study.train | changes, **study_options)
    backwards = replace(study, arms=dict(reversed(study.arms.items())))
    progress, results_by_arm = [], []
    for number, ordered_study in enumerate((study, backwards)):
        run.EVALUATORS.clear()
        results = run_study(ordered_study, tmp_path / str(number), 1, progress.append)
        results_by_arm.append({result.cell.arm: result for result in results})
    assert not any(p.error for p in progress) and [p.cell.arm for p in progress[2:]] == [
        "shown",
        "lora",
    ]
    for arm in study.arms:
        assert results_by_arm[0][arm].scores == results_by_arm[1][arm].scores
    lora, by_references = results_by_arm[0]["lora"], results_by_arm[0]["shown"]
    assert by_references.cost["parameters"] == 0 and by_references.cost["rank"] == 4
    assert by_references.scores["dino_base"] == lora.scores["dino_base"]
    strips = [
        run.get_result_path(study, result.cell, tmp_path / "0") for result in (lora, by_references)
    ]
    assert len({path.with_suffix(".jpg").read_bytes() for path in strips}) == 2

    # the report: the difference, the verdict, a strip of each
    out = tmp_path / "0"
    findings = write_comparison(study, run_study(study, out, 0, progress.append), out)
    verdict = findings.splitlines()[-1]
    assert "shown r4 against lora: score" in findings
    assert (
        verdict.startswith("lora r4 against shown: ")
        and "adapter less references: DINO" in findings
    )
    html = (out / "report.html").read_text()
    assert verdict in html and html.count("data:image/jpeg") == 2
    facts = json.loads((out / "results.json").read_text())
    assert facts["by_references"]["lora r4 against shown"]["likeness"]["mean"] == pytest.approx(
        lora.scores["dino"] - by_references.scores["dino"], abs=1e-3
    )


def test_pictures_are_compared_with_real_photos(study, tmp_path):
    folder = paint_photos(tmp_path / "photos")
    record = SyntheticRecord(
        base="a model",
        licence="",
        prompt="",
        seed=0,
        made_from="",
        likeness=1.0,
        rejected="",
    )
    write_record(folder, {"0.png": record, "2.png": record})
    subjects = (StudySubject(str(folder), "a photo of sks dog"),)
    evaluator = run.get_evaluator(replace(study, subjects=subjects), "photos")
    (photo,) = evaluator.photos.pictures
    assert photo.tobytes() == Image.open(folder / "1.png").convert("RGB").tobytes()


def test_another_base_or_photo_is_another_cell_and_a_text_is_not(study, tiny_base, tmp_path):
    base, photos = (tmp_path / name for name in ("base", "photos"))
    shutil.copytree(tiny_base, base)
    shutil.copytree(study.subjects[0].photos, photos)
    subject = replace(study.subjects[0], photos=str(photos))
    copied = replace(
        study,
        train={**study.train, "pretrained_model_name_or_path": str(base)},
        subjects=(subject,),
    )
    cell = Cell("test", "lora", 4, "photos", 0, 1e-3)

    def path():
        run.digest_content.cache_clear()
        return run.get_result_path(copied, cell, tmp_path)

    first = path()
    (base / "README.md").write_text("a card")
    assert path() == first
    weights = next(base.rglob("unet/*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    second = path()
    next(photos.glob("*.png")).write_bytes(b"another photo")
    assert len({first, second, path()}) == 3


def test_a_failed_arm_is_reported_and_class_images_are_shared(study, tmp_path):
    prior = {"with_prior_preservation": True, "prior": "class_images", "num_class_images": 1}
    subject = replace(study.subjects[0], class_prompt="a photo of dog")
    arms = {"alone": {}, "odd": {"target_modules": ["to_quarrel"]}}
    changes = {"subjects": (subject,), "arms": arms, "reference": "alone", "budget": "rank"}
    few = replace(
        study, **changes, train=study.train | prior, tuning_subjects=(), learning_rates=(1e-2,)
    )
    progress, out = [], tmp_path / "out"
    (alone,) = run_study(few, out, 1, progress.append)
    assert alone.cell.arm == "alone" and [bool(p.error) for p in progress] == [False, True]
    assert "no such layer" in progress[1].error
    (folder,) = (out / "class_images").iterdir()
    assert folder.name.startswith("test-")
    assert [cell.arm for cell in list_unfinished(few, out)] == ["odd"]


def test_workers_take_turns_on_the_gpus():
    for count, visible, names in (
        (0, None, [None] * 3),
        (1, "3", [None] * 3),
        (2, None, ["0", "1", "0"]),
        (2, "GPU-a,GPU-b", ["GPU-a", "GPU-b", "GPU-a"]),
    ):
        assert [run.choose_gpu(number, count, visible) for number in range(3)] == names


POOL = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from dreambooth_moslora.extras.lab.run import begin_worker
if __name__ == "__main__":
    context = get_context("spawn")
    pool = ProcessPoolExecutor(1, context, begin_worker, (1, os.getpid(), context.Value("i", 0)))
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600).result()
"""


def test_workers_end_with_the_study_that_started_them():
    study = subprocess.Popen([sys.executable, "-c", POOL], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(study.stdout.readline()))
    assert worker.is_running()
    study.kill()
    study.wait()
    deadline = time.monotonic() + 20
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker goes on alone"
        time.sleep(0.1)


def test_the_report_is_one_file_without_network_or_paths(study, finished):
    out, results, _ = finished
    line = write_comparison(study, results, out)
    assert "mix r4 against lora" in line
    html, facts = (out / "report.html").read_text(), json.loads((out / "results.json").read_text())
    assert not re.search(r"""(src|href)=["'](?!data:)""", html) and not re.search("https?:", html)
    assert html.count("data:image/png") == 2 and html.count("data:image/jpeg") == 2
    assert len(facts["cells"]) == 6 and facts["against_reference"][0]["arm"] == "mix"
    for text in (html, json.dumps(facts)):
        assert str(out.parent) not in text
    assert (out / "table.md").read_text().startswith("| Arm | Rank |")


def made(study, arm: str, stage="test", seed=0, rate=1e-3, score=0.5, subject="test") -> CellResult:
    cost = {"rank": 4, "parameters": 1, "step_sec": 1, "memory_gib": 1, "jobs": 2}
    pictures, scores = (
        {name: [score, score] for name in comparison.list_image_measures()},
        dict.fromkeys(comparison.list_study_measures(), score),
    )
    return CellResult(Cell(stage, arm, 4, subject, seed, rate), scores, pictures, cost)


def test_a_failed_rate_is_not_chosen_and_the_study_goes_on(study):
    tune = {"stage": "tune", "subject": "tune"}
    good = [made(study, arm, rate=rate, **tune) for arm in study.arms for rate in (1e-3, 1e-2)]
    failed = [r for r in good if not (r.cell.arm == "mix" and r.cell.learning_rate == 1e-3)]
    assert run.choose_test_cells(study, failed) and comparison.choose_best_rates(study, failed) == {
        ("lora", 4): 1e-3,
        ("mix", 4): 1e-2,
    }
    assert not run.choose_test_cells(study, [r for r in good if r.cell.arm == "lora"])
    two = replace(
        study, tuning_subjects=(*study.tuning_subjects, replace(study.subjects[0], photos="other"))
    )
    assert not run.choose_test_cells(two, good)  # a rate needs all of its subjects


def test_an_unfinished_seed_does_not_empty_the_report(study, tmp_path):
    first = [made(study, arm, score=score) for arm, score in (("lora", 0.5), ("mix", 0.6))]
    results = [*first, made(study, "mix", seed=1)]
    assert "mix r4 against lora: score +0.100" in write_comparison(study, results, tmp_path)
    facts = json.loads((tmp_path / "results.json").read_text())
    assert (
        facts["study"]["seeds"] == [0]
        and "2 trainings at once" in (tmp_path / "table.md").read_text()
    )


def test_equal_budget_means_the_nearest_number_of_parameters(study):
    frozen = {"mixer": "orthogonal", "train_mixer": False}
    study = replace(study, arms=study.arms | {"frozen": frozen}, ranks=(16,))
    ranks = budget.choose_ranks(study)
    assert ranks["lora", 16] == ranks["frozen", 16] == 16 and ranks["mix", 16] < 16

    def config(arm: str, rank: int) -> TrainConfig:
        return TrainConfig.from_dict({**study.train, **study.arms[arm], "rank": rank})

    target = budget.count_parameters(config("lora", 16), 16)
    gaps = {r: abs(budget.count_parameters(config("mix", 16), r) - target) for r in range(1, 17)}
    assert gaps[ranks["mix", 16]] == min(gaps.values())


def test_the_counted_parameters_are_those_that_are_trained(study, tiny_base):
    kinds = [
        {"mixer": "orthogonal"},
        {"mixer": "none"},
        {"mixer": "identity", "train_mixer": False},
    ]
    for settings in (*kinds, {"mixer": "orthogonal", "rank_pattern": ["*.to_k=2"]}):
        config = TrainConfig.from_dict({**study.train, **settings, "rank": 4})
        unet = load_pipeline(tiny_base).unet
        add_adapters(config, {"unet": unet})
        real = sum(p.numel() for _, p in list_adapter_parameters(unet))
        assert budget.count_parameters(config, 4) == real


def test_another_initial_adapter_is_another_cell(study, tmp_path, monkeypatch):
    """That of `~/first.safetensors` was not counted."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    begun = replace(study, train={**study.train, "init_adapter": "~/first.safetensors"})
    paths = set()
    for content in ("one", "other"):
        (tmp_path / "first.safetensors").write_text(content)
        run.digest_content.cache_clear()
        paths.add(run.get_result_path(begun, Cell("test", "lora", 4, "test", 0, 1e-3), tmp_path))
    assert len(paths) == 2
