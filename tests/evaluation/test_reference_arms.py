"""Whether to train at all: the same prompts by an adapter, by reference images, and by both."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.cli.command_evaluate import run_explain
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.evaluation import reference_arms, report
from dreambooth_moslora.evaluation.protocol import EvaluationPlan
from dreambooth_moslora.evaluation.scoring import Evaluator, evaluate_adapter
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.generation.sampling import Sampler
from dreambooth_moslora.plan.validation import check_references
from dreambooth_moslora.settings.prompts import SubjectWords
from dreambooth_moslora.settings.train_config import TrainConfig
from tests.evaluation.test_scoring import TOY, toy_pictures
from tests.generation.test_text_options import load_adapter
from tests.helpers.tiers import slow_but
from tests.helpers.tiny_encoders import tiny_encoders
from tests.helpers.tiny_families import tiny_pipeline

PLAN = EvaluationPlan(
    SubjectWords("sks", "duck"),
    ("a photo of a {} on the beach", "a photo of a {} in the snow"),
    ("a photo of a red car on water",),
    seeds=(0, 1),
    class_images=0,
    inference_steps=2,
)


def make_scores(dino: float, clip_t: float, spread: float) -> dict[str, np.ndarray]:
    """Return scores of six prompts and four seeds around these means."""
    noise = np.random.default_rng(int(1000 * dino)).normal(size=(2, 6, 4)) * spread
    return {"dino": dino + noise[0], "clip_t": clip_t + noise[1]}


@pytest.mark.parametrize(
    "adapter, references, conclusion",
    [
        (
            make_scores(0.80, 0.30, 0.02),
            make_scores(0.60, 0.30, 0.02),
            reference_arms.VERDICT_TRAIN,
        ),
        (
            make_scores(0.55, 0.30, 0.02),
            make_scores(0.70, 0.30, 0.02),
            reference_arms.VERDICT_DO_NOT_TRAIN,
        ),
        (
            make_scores(0.66, 0.30, 0.20),
            make_scores(0.62, 0.30, 0.20),
            reference_arms.VERDICT_UNKNOWN,
        ),
        (
            make_scores(0.80, 0.20, 0.02),
            make_scores(0.60, 0.30, 0.02),
            reference_arms.VERDICT_MIXED,
        ),
    ],
)
def test_the_verdict_follows_the_paired_intervals(adapter, references, conclusion):
    verdict = reference_arms.compare_tables(adapter, references)
    assert verdict.conclusion == conclusion and str(verdict).startswith(conclusion)
    assert verdict.likeness.low <= verdict.likeness.mean <= verdict.likeness.high


def test_a_single_image_decides_nothing():
    adapter, references = (
        {name: table[:1, :1] for name, table in make_scores(dino, 0.3, 0.0).items()}
        for dino in (0.9, 0.1)
    )
    verdict = reference_arms.compare_tables(adapter, references)
    assert verdict.conclusion == reference_arms.VERDICT_UNKNOWN


@pytest.mark.parametrize("name", slow_but((), ("flux2", "qwen_image21")))
def test_three_arms_are_compared_and_the_report_has_a_verdict(name, tmp_path):
    subject = SubjectPipeline(tiny_pipeline(name, tmp_path / "base"), "tiny")
    subject.resolution_px = 64
    adapter = load_adapter(subject, tmp_path / "dog.safetensors")
    photos = toy_pictures(TOY, ["on grass", "on the beach"])
    evaluator = Evaluator(PLAN, tiny_encoders(tmp_path), photos)
    judge = partial(evaluate_adapter, subject, adapter)

    # References of an arm are not shown to the base, even if that arm is evaluated first.
    reference_evaluator = Evaluator(PLAN, evaluator.encoders, photos)
    first = reference_arms.evaluate_references(reference_evaluator, judge)
    evaluation = judge(evaluator)
    assert np.array_equal(first.tables["dino_base"], evaluation.tables["dino_base"])
    evaluation.beside = reference_arms.evaluate_arms(evaluator, evaluation, judge, scale=1.0)
    images = [arm.pictures["subject"][0].tobytes() for arm in evaluation.beside.arms.values()]
    images.append(evaluation.pictures["subject_base"][0].tobytes())
    assert len(set(images)) == 4
    prompt = evaluation.beside.arms["references"].plan.subject_requests[0].prompt
    assert prompt.endswith("a duck on the beach, the same duck as in the reference pictures")

    # CLIP-T compares all arms with the same texts.
    assert np.array_equal(
        evaluation.tables["clip_t_base"], evaluation.beside.arms["references"].tables["clip_t_base"]
    )
    context = report.ReportContext("dog", "tiny", ("clip", "dino"), 2, 4.0)
    scores = report.build_scores_json(evaluation, context)["references"]
    assert scores["verdict"] == str(evaluation.beside.verdict) and set(scores["arms"]) == {
        "adapter",
        "references",
        "both",
    }
    assert str(evaluation.beside.verdict) in report.render_report(evaluation, context, photos)


@pytest.mark.parametrize("name", slow_but((), ("flux2", "qwen_image21")))
def test_guidance_acts_with_and_without_references(name, tmp_path):
    """Check that the arms are compared at the same guidance."""
    pipeline = tiny_pipeline(name, tmp_path / "base")
    embed = partial(SubjectPipeline(pipeline, "tiny").family.encode_prompts, pipeline)
    plain = Sampler(pipeline, embed, 64, torch.device("cpu"), None, inference_steps=2)
    requests = PLAN.subject_requests[:1]
    for references in ((), toy_pictures(TOY, ["on grass"])):
        sampler = replace(plain, references=references)
        pictures = [next(replace(sampler, guidance_scale=scale)(requests)) for scale in (1.0, 4.0)]
        assert pictures[0].tobytes() != pictures[1].tobytes()


def test_explain_prints_a_verdict_and_why_there_is_no_score(tmp_path, capsys):
    run = tmp_path / "dog"
    (run / "evaluation").mkdir(parents=True)
    settings = {"instance_data_dir": str(tmp_path), "output_dir": str(run)}
    RunDir(run).config_path.write_text(json.dumps(settings))
    RunDir(run).metrics_path.write_text("")
    scores = {
        "time": 1e12,
        "protocol": {"adapter_scale": 1.0},
        "scores": {},
        "relative": {},
        "copy_alarm": {"raised": False, "share": 0.0},
        "leaked": "",
        "score": None,
        "no_score": "the base draws so",
        "references": {"verdict": reference_arms.VERDICT_TRAIN},
    }
    (run / "evaluation" / "scores.json").write_text(json.dumps(scores))
    assert run_explain(SimpleNamespace(run=str(run))) == 0
    out = capsys.readouterr().out
    assert reference_arms.VERDICT_TRAIN in out and "no score: the base draws so. " in out


def test_a_base_without_references_is_refused_in_one_line():
    with pytest.raises(UserError, match="takes no reference pictures") as error:
        check_references(Base.find("toy"), TrainConfig(), "--reference")
    assert "\n" not in str(error.value)
