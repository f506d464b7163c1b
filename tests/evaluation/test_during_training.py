"""Scores during training: the best step is kept and named in the card."""

import json
import logging
import re
import shutil
from argparse import Namespace
from dataclasses import replace

import pytest
from PIL import Image

from dreambooth_moslora.cli.command_evaluate import get_default_folder
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.evaluation.during_training import TrainingEvaluator
from dreambooth_moslora.evaluation.protocol import EvaluationPlan
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.photos.folder import build_photo_report
from dreambooth_moslora.plan.plan import make_plan
from dreambooth_moslora.settings import prompts, train_config
from dreambooth_moslora.training.best_step import BestStep, find_best_step
from dreambooth_moslora.training.loop import train
from tests.helpers.folding import load_published
from tests.helpers.tiny import tiny_unet
from tests.helpers.tiny_adapters import save_diffusers_lora
from tests.helpers.tiny_encoders import save_tiny_encoders
from tests.helpers.tiny_training import adapter_sha256, logged, paint_photos, tiny_config


def build_quick_evaluator(config: train_config.TrainConfig, encoders) -> TrainingEvaluator:
    evaluator = TrainingEvaluator(config, build_photo_report(config).photos, encoders)
    evaluator.plans = [plan.reduce_plan(2, 1, 1, 1, inference_steps=2) for plan in evaluator.plans]
    return evaluator


@pytest.fixture(scope="module")
def run(tiny_base, encoders, tmp_path_factory):
    home = tmp_path_factory.mktemp("run")
    scored = {"max_train_steps": 4, "evaluate_steps": 1}
    config = tiny_config(tiny_base, paint_photos(home / "photos"), home / "dog", **scored)
    train(config, evaluator=build_quick_evaluator(config, encoders))
    return config, RunDir(home / "dog")


@pytest.fixture
def scored(tiny_base, tmp_path):
    """Return a configuration that is evaluated after each step."""

    def config(name: str = "dog", **options) -> train_config.TrainConfig:
        photos = tmp_path / "photos"
        if not photos.exists():
            paint_photos(photos)
        return tiny_config(tiny_base, photos, tmp_path / name, **{"evaluate_steps": 1} | options)

    return config


def test_only_the_first_process_loads_encoders(scored, encoders, monkeypatch):
    """Check that all processes have the same prompts, and that a missing encoder is reported
    early."""

    def nowhere(*_, **__):
        raise UserError("the encoder cannot be loaded")

    config = scored()
    plan = make_plan(config)
    evaluator = TrainingEvaluator(plan.config, plan.photos, scores=False)
    assert (
        evaluator.encoders is None
        and evaluator.prompts == TrainingEvaluator(config, plan.photos, encoders).prompts
    )
    monkeypatch.setattr("dreambooth_moslora.evaluation.metrics.load_encoders", nowhere)
    with pytest.raises(UserError, match="cannot be loaded"):
        TrainingEvaluator(config, plan.photos)


def test_evaluations_are_logged_and_do_not_change_the_adapter(run, tmp_path):
    events = logged(run[1].path, "evaluation")
    assert [event["step"] for event in events] == [1, 2, 3, 4]
    for event in events:
        assert {
            "dino",
            "dino_bare",
            "clip_i",
            "clip_t",
            "pres",
            "drift",
            "copied",
            "score",
        } <= event.keys()
        assert event["photos"] == {"count": 3, "without_bare_prompt": 0}
        bare = 1  # at the instance prompt, by the adapter alone
        assert event["cost"]["pictures"] == 2 * (2 + 1 + 1) + bare and event["cost"]["seconds"] > 0
    train(replace(run[0], output_dir=str(tmp_path / "dog"), evaluate_steps=None))
    assert adapter_sha256(tmp_path / "dog") == adapter_sha256(run[1].path)


def test_scoring_reports_each_denoising_step(run):
    """It was silent for a minute. The base's images, in three batches, are generated once; the
    adapter's are four batches."""
    phases = [event for event in logged(run[1].path, "phase") if event["phase"] == "evaluating"]
    totals = [event["total"] for event in phases if event["done"] == event["total"]]
    assert totals == [2 * (3 + 4), 2 * 4, 2 * 4, 2 * 4]


def test_the_best_step_is_kept_and_the_card_names_it(run, tiny_base):
    """Check also that of equal scores the first is the best."""
    assert find_best_step([(1, 0.5), (2, 0.7), (3, 0.7), (4, 0.1)]) == BestStep(2, 0.7, since=2)
    events = logged(run[1].path, "evaluation")
    best = max(events, key=lambda event: (event["score"], -event["step"]))
    assert events[-1]["best"]["step"] == best["step"]
    card = run[1].card_path.read_text()
    assert (
        f"Best step: {best['step']}, score {best['score']:.3f}" in card
        and "`best/`, which is not uploaded" in card
    )
    assert f"| dino_bare | {events[-1]['dino_bare']:.3f} |" in card
    with Image.open(run[1].path / "loss.png") as plot:
        assert plot.width == plot.height  # the fidelity plot is below the loss plot
    assert SubjectPipeline.from_base(tiny_base).load_adapter(run[1].best_dir) == "dog@best"
    for file in (run[1].adapter_path, run[1].kohya_path):
        assert str(run[1].path.parent) not in load_published(file)[1].to_json()


@pytest.mark.slow
def test_the_card_of_a_resumed_run_has_the_scores_from_before(scored, encoders, tmp_path):
    events = []
    whole, torn = (scored(name, max_train_steps=3, evaluate_steps=2) for name in ("whole", "torn"))
    train(whole, evaluator=build_quick_evaluator(whole, encoders))
    train(
        torn,
        events.append,
        lambda: any(e.kind == "evaluation" for e in events),
        build_quick_evaluator(torn, encoders),
    )
    train(
        replace(torn, resume_from_checkpoint="latest"),
        evaluator=build_quick_evaluator(torn, encoders),
    )
    cards = [(tmp_path / name / "README.md").read_text() for name in ("whole", "torn")]
    assert all(line in card for card in cards for line in ("Best step: 2", "| score |"))
    scores = [[line for line in card.splitlines() if line.startswith("| ")] for card in cards]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_a_resumed_run_also_warns_of_a_score_that_stays(scored, encoders, caplog):
    config = scored(max_train_steps=5, learning_rate=0.0, checkpointing_steps=1)
    caplog.set_level(logging.WARNING)
    for run_config in (config, replace(config, resume_from_checkpoint="latest")):
        caplog.clear()
        train(run_config, evaluator=build_quick_evaluator(run_config, encoders))
        assert "the score has not risen" in caplog.text


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Return the command on a run with tiny encoders: its exit code and output."""
    clip, dino = save_tiny_encoders(tmp_path)

    def run(folder, *flags) -> tuple[int, str, str]:
        try:
            code = main(["evaluate", str(folder), "--clip", str(clip), "--dino", str(dino), *flags])
        except SystemExit as end:  # argparse's own way
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_the_evaluate_command_leaves_a_report_beside_the_run(run, evaluate):
    flags = [
        "--num_prompts",
        "2",
        "--images-per-prompt",
        "2",
        "--class_images",
        "1",
        "--inference_steps",
        "2",
    ]
    before = run[1].adapter_path.read_bytes()
    code, out, err = evaluate(run[1].path, *flags)
    assert (
        code == 0
        and "generating images: 100%" in err
        and "Loading" not in err
        and "float32: []" not in err
    )
    html = (run[1].path / "evaluation" / "report.html").read_text()
    scores = (run[1].path / "evaluation" / "scores.json").read_text()
    assert (
        not re.search("https?:", html)
        and html.count("data:image/jpeg") == 3 + 2 * 4 + 2 + 2 + 2 * 1 + 2 * 12
    )
    assert "The instance prompt alone: “a photo of sks dog”" in html and "DINO, bare prompt" in html
    for text in (html, scores):
        assert str(run[1].path.parent) not in text
    assert "likeness to the photos " in out and "dino_bare" in json.loads(scores)["scores"]
    assert "likeness without a place " in out and run[1].adapter_path.read_bytes() == before


def test_the_report_of_a_checkpoint_outlives_it(run):
    paths = (run[1].path, run[1].best_dir, run[1].last_dir)
    folders = [get_default_folder(Namespace(adapter=str(p), output_dir=None)) for p in paths]
    names = ("evaluation", "best_evaluation", "last_evaluation")
    assert folders == [run[1].path / name for name in names]


def test_mistakes_are_reported_before_any_image(run, tmp_path, evaluate):
    folder = shutil.copytree(run[1].path, tmp_path / "dog")
    (tmp_path / "latin.txt").write_bytes("à {}".encode("latin-1"))
    for flags, message in (
        (["--output_dir", str(folder / "train_config.json")], "cannot be written: Not a directory"),
        (["--prompts", str(tmp_path / "latin.txt")], "not a text file"),
        ([], "not valid JSON"),
    ):
        if not flags:
            (folder / "train_config.json").write_text("{")
        code, _, err = evaluate(folder, *flags)
        assert code == 2 and message in err and "generating" not in err
    code, _, err = evaluate(save_diffusers_lora(tiny_unet(), tmp_path))
    assert code == 2 and "give --base" in err
    plan = EvaluationPlan(prompts.SubjectWords("sks", "dog"), ("a {} in {curly} beside a {}",), ())
    assert plan.texts == ["a dog in {curly} beside a dog"]


@pytest.mark.slow
def test_two_subjects_are_scored_in_training_and_by_command(
    tiny_base, encoders, evaluate, tmp_path
):
    pets = [
        (str(paint_photos(tmp_path / class_word)), f"a photo of sks {class_word}")
        for class_word in ("dog", "cat")
    ]
    tables = [{"instance_data_dir": photos, "instance_prompt": prompt} for photos, prompt in pets]
    sizes, events = {"max_train_steps": 2, "evaluate_steps": 1}, []
    config = tiny_config(tiny_base, None, tmp_path / "run", subjects=tables, **sizes)
    train(config, events.append, evaluator=build_quick_evaluator(config, encoders))
    scores = [event.scores for event in events if event.kind == "evaluation"][-1]
    assert {"confusion", "dino_subject_1", "dino_subject_2", "score"} <= scores.keys()
    assert scores["dino"] == pytest.approx(
        (scores["dino_subject_1"] + scores["dino_subject_2"]) / 2, abs=1e-3
    )
    flags = [
        "--num_prompts",
        "1",
        "--images_per_prompt",
        "1",
        "--class_images",
        "1",
        "--inference_steps",
        "2",
    ]
    code, out, _ = evaluate(tmp_path / "run", *flags)
    assert code == 0 and "report.html" in out
    assert (tmp_path / "run" / "evaluation" / "subject_2" / "scores.json").is_file()
    code, _, err = evaluate(tmp_path / "run", *flags, "--instance_prompt", "a photo of sks cat")
    assert code == 2 and "several subjects, which are judged together: leave out" in err
