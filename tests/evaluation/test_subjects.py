"""Several subjects of one adapter: who is taken for whom, all together, and two in one prompt."""

import json

import numpy as np
import pytest
import torch

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.evaluation import metrics
from dreambooth_moslora.evaluation.during_training import TrainingEvaluator
from dreambooth_moslora.evaluation.evaluate import Evaluator
from dreambooth_moslora.evaluation.metrics import load_encoders
from dreambooth_moslora.evaluation.protocol import EvaluationPlan, Subject
from dreambooth_moslora.evaluation.report import ReportContext, confusion_lines, pairs_of, pooled, write_reports
from dreambooth_moslora.photos.folder import photo_report
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.loop import train
from tests.evaluation.test_evaluate import TOY, stub_pictures, toy_pictures
from tests.helpers.tiny_encoders import save_tiny_encoders
from tests.helpers.tiny_training import paint_photos, tiny_config
from toybox.world import Toy

PLACES = ("a photo of a {} on the beach", "a photo of a {} in the snow", "a photo of a {} on lava")
ROCKET = Toy("rocket", "white", "red", "striped", "glossy", (0.3, 0.5, -0.2, 0.8), ("flag",))
ABOUT = ReportContext("both", "toy", ("clip", "dino"), 2, 7.0)


def plan(word):
    return EvaluationPlan(
        Subject("sks", word), PLACES, ("a photo of a red car",), seeds=(0, 1), class_images=2, inference_steps=2
    )


@pytest.fixture(scope="module")
def photos():
    places = ["on grass", "on the beach", "in a kitchen"]
    return {"duck": toy_pictures(TOY, places), "rocket": toy_pictures(ROCKET, places)}


@pytest.fixture(scope="module")
def evaluators(photos):
    encoders = load_encoders("toy")  # random ones see no difference
    duck, rocket = (Evaluator(plan(word), encoders, photos[word]) for word in ("duck", "rocket"))
    duck.rivals, rocket.rivals = {"sks rocket": rocket.photos.dino}, {"sks duck": duck.photos.dino}
    return [duck, rocket]


def drawer(photos, swapped=False):
    """The adapter draws photos of the subject that a prompt names, or of the other one; the base, noise."""
    kinds = {"sks duck": "rocket" if swapped else "duck", "sks rocket": "duck" if swapped else "rocket"}

    def draw(requests, with_adapter):
        if not with_adapter:
            return stub_pictures(requests)
        words = [next((w for w in kinds if w in request.prompt), None) for request in requests]
        return [photos[kinds[word]][n % 3] if word else stub_pictures([requests[n]])[0] for n, word in enumerate(words)]

    return draw


@pytest.fixture(scope="module")
def right(evaluators, photos):
    """Of an adapter that draws what it is asked for."""
    return [evaluator(drawer(photos)) for evaluator in evaluators]


def test_confusion_is_the_way_from_the_own_photos_margin_to_the_others():
    draws = torch.Generator().manual_seed(0)
    own, other, drawn = (torch.nn.functional.normalize(torch.randn(n, 8, generator=draws), dim=1) for n in (3, 4, 5))

    def without(photos, number):
        return torch.cat([photos[:number], photos[number + 1 :]])

    def margin(picture, own, other):
        return float((own @ picture).mean() - (other @ picture).mean())

    at_own = np.mean([margin(photo, without(own, n), other) for n, photo in enumerate(own)])
    at_other = np.mean([margin(photo, own, without(other, n)) for n, photo in enumerate(other)])
    expected = [(at_own - margin(picture, own, other)) / (at_own - at_other) for picture in drawn]
    assert metrics.confusion(drawn, own, other).tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.isfinite(metrics.confusion(own, own, own)).all()
    assert torch.isfinite(metrics.confusion(own, own[:1], other[:1])).all()


def test_pictures_of_the_other_subject_are_confused_and_those_of_the_own_are_not(evaluators, photos, right):
    wrong = [evaluator(drawer(photos, swapped=True)) for evaluator in evaluators]
    for good, bad in zip(right, wrong, strict=True):
        assert good.tables["confusion"].shape == (3, 2)
        assert good.mean("confusion") < 0.05 and bad.mean("confusion") > 0.95
        assert good.mean("dino") > bad.mean("dino")
    assert "“sks duck” with “sks rocket”" in confusion_lines(right)[0]


def test_all_subjects_together_are_their_prompts_together(right):
    found, whole = right, pooled(right)
    assert whole.tables["dino"].shape == (6, 2) and whole.tables["pres"].shape == (4,)
    assert whole.mean("dino") == pytest.approx(np.mean([one.mean("dino") for one in found]))
    assert whole.score == pytest.approx(np.mean([one.score for one in found])) and whole.alarm.raised
    assert not any("sks" in name for name in whole.tables) and "confusion" in whole.means()
    assert pooled(found[:1]) is found[0]


def test_the_report_has_matrices_pictures_by_subject_and_pairs(evaluators, photos, right, tmp_path):
    draw, (pair,) = drawer(photos), pairs_of(evaluators)
    asked = []
    together = pair(lambda requests, on: asked.append((requests[0].prompt, on)) or draw(requests, on))
    assert asked == [
        ("a photo of a sks duck and a sks rocket on the beach", True),
        ("a photo of a duck and a rocket on the beach", False),
    ]
    write_reports(tmp_path, evaluators, right, [together], ABOUT)
    scores = json.loads((tmp_path / "scores.json").read_text())
    cells = {(cell["of"], cell["with"]): cell for cell in scores["confusion"]}
    assert cells.keys() == {("sks duck", "sks rocket"), ("sks rocket", "sks duck")}
    cell = cells["sks duck", "sks rocket"]
    assert cell["confusion"]["low"] <= cell["confusion"]["mean"] < 0.05 < cell["confusion_base"]["mean"]
    assert cell["dino_own"]["mean"] > cell["dino_other"]["mean"]
    assert [one["subject"]["class_word"] for one in scores["subjects"]] == ["duck", "rocket"]
    assert scores["together"][0]["words"] == ["sks duck", "sks rocket"]
    assert scores["together"][0]["first"]["mean"] > scores["together"][0]["second"]["mean"]
    html = (tmp_path / "report.html").read_text()
    for title in ("Are they told apart?", "“sks duck”", "“sks duck” and “sks rocket” in one prompt"):
        assert f"<h2>{title}</h2>" in html
    assert "Confusion" in (tmp_path / "subject_2" / "report.html").read_text()


@pytest.mark.slow
def test_a_run_of_two_is_scored_along_the_way_and_by_the_command(tiny_base, encoders, tmp_path, capsys):
    tables = [
        {"instance_data_dir": str(paint_photos(tmp_path / word)), "instance_prompt": f"a photo of sks {word}"}
        for word in ("dog", "cat")
    ]
    settings = tiny_config(tiny_base, None, tmp_path / "run", max_train_steps=2, evaluate_steps=1).to_dict()
    for name in ("instance_data_dir", "instance_prompt", "class_prompt"):
        del settings[name]
    config = TrainConfig.from_dict({**settings, "subjects": tables})
    evaluator = TrainingEvaluator(config, photo_report(config).photos, encoders)
    evaluator.plans = [plan.smaller(2, 1, 1, 1, inference_steps=2) for plan in evaluator.plans]
    events = []
    train(config, events.append, evaluator=evaluator)
    scores = [event.scores for event in events if event.kind == "evaluation"][-1]
    assert {"confusion", "dino_subject_1", "dino_subject_2", "score"} <= scores.keys()
    assert scores["dino"] == pytest.approx((scores["dino_subject_1"] + scores["dino_subject_2"]) / 2, abs=1e-3)

    clip, dino = save_tiny_encoders(tmp_path / "encoders")
    size = ["--num_prompts", "1", "--images_per_prompt", "1", "--class_images", "1", "--inference_steps", "2"]
    words = ["evaluate", str(tmp_path / "run"), "--clip", str(clip), "--dino", str(dino), *size]
    assert main(words) == 0
    assert "confusion of “sks dog” with “sks cat”" in capsys.readouterr().out
    assert (tmp_path / "run" / "evaluation" / "subject_2" / "scores.json").is_file()
    assert main([*words, "--instance_prompt", "a photo of sks cow"]) == 2
    assert "name one of 'a photo of sks dog', 'a photo of sks cat'" in capsys.readouterr().err
    assert main([*words, "--instance_prompt", "a photo of sks cat", "--output_dir", str(tmp_path / "cat")]) == 0
    assert json.loads((tmp_path / "cat" / "scores.json").read_text())["subject"]["class_word"] == "cat"
