"""A style's score and leak, against truth: the toy world is rendered in two styles."""

import random
from copy import copy

import pytest
import torch
from PIL import Image

from dreambooth_moslora.cli.command_evaluate import format_summary
from dreambooth_moslora.evaluation import metrics, report
from dreambooth_moslora.evaluation.protocol import build_subject_plan, collect_nouns
from dreambooth_moslora.evaluation.scoring import Evaluation, Evaluator
from dreambooth_moslora.photos import captions
from dreambooth_moslora.photos.photo_file import Photo
from dreambooth_moslora.plan import defaults
from dreambooth_moslora.settings.train_config import TrainConfig
from tests.evaluation.test_scoring import ABOUT
from toybox.render import render
from toybox.styles import STYLES
from toybox.world import Toy, sample_scene, sample_toy

INK = TrainConfig(
    instance_prompt="a picture in ink style", token="ink", subject="style", resolution=128
)
ROCKET = Toy("rocket", "white", "red", "striped", "glossy")
# The colour and kind of each toy that the toy world's prompts of styles ask for
ASKED = (
    ("yellow", "duck", "on the beach"),
    ("blue", "car", "on a city street"),
    ("red", "rocket", "in the snow"),
    ("green", "dinosaur", "on a wooden floor"),
    ("white", "teapot", "in a kitchen"),
    ("purple", "robot", "in the desert"),
)


def shown(toys: list[Toy], places: list[str], style: str = "", seed: int = 0) -> list:
    rng = random.Random(seed)
    scenes = [sample_scene(rng, toy, place, held_out=None) for toy, place in zip(toys, places)]
    pictures = [STYLES[style](one) if style else one for one in render(scenes, 64)]
    return [Image.fromarray(picture.numpy()) for picture in pictures]


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    """Of the ink style, whose pictures all show a white rocket."""
    places = ["on grass", "in a forest", "on the moon", "on lava"]
    photos = shown([ROCKET] * 4, places, "ink")
    said = [f"a photo of a white rocket {place} in ink style" for place in places]
    kept = [Photo(f"{n}.png", (64, 64), (caption,)) for n, caption in enumerate(said)]
    plan = build_subject_plan(INK, kept, seeds=(0,))
    assert (
        plan.things == ("white rocket",)
        and plan.texts[0] == "a photo of a yellow duck on the beach"
    )
    assert "in ink style" in plan.subject_requests[0].prompt and not plan.class_requests
    return Evaluator(plan, metrics.load_encoders("toy"), photos)


def scored(evaluator: Evaluator, style: str, planted: int = 0, base_style: str = "") -> Evaluation:
    """The toys that were asked for in a style; `planted` of them are white rockets instead."""

    def draw(requests, on):
        rng = random.Random(1)
        asked = [one for one in ASKED for _ in range(len(requests) // len(ASKED) or 1)]
        asked = asked[: len(requests)]
        toys = [sample_toy(rng, kind, colour=colour) for colour, kind, _ in asked]
        if on:
            toys[:planted] = [ROCKET] * planted
        places = [place for *_, place in asked]
        return shown(toys, places, style if on else base_style, seed=2)

    return evaluator(draw)


def test_a_style_that_the_base_has_already_gets_no_score_and_the_report_says_why(evaluator):
    """The rest of the distance to the photos' style was noise, and so was the score."""
    inked = copy(evaluator)
    inked._base = {}
    found = scored(inked, "ink", base_style="ink")
    reason = "about as like the photos' style as the photos are to each other"
    assert found.score is None and "style" not in found.tables and "leak" in found.tables
    assert f"score              none: {metrics.NO_STYLE_SCORE}" in format_summary(found)
    scores = report.build_scores_json(found, ABOUT)
    assert scores["score"] is None and reason in scores["no_score"]
    page = report.render_report(found, ABOUT, inked.photos.pictures)
    assert reason.replace("'", "&#39;") in page and "<b>Score" not in page
    assert "score" not in found.list_logged_scores() and found.list_logged_scores()["leak"] >= 0
    whole = scored(evaluator, "ink")
    assert report.build_scores_json(whole, ABOUT)[
        "no_score"
    ] == "" and "none" not in format_summary(whole)

    # Of several subjects the mean is of those that have a score.
    both = report.merge_evaluations([found, whole])
    assert both.score == whole.score and both.no_score == found.no_score
    assert report.merge_evaluations([found, found]).score is None


@pytest.mark.slow
def test_the_style_is_told_from_another_and_from_none_and_a_planted_thing_is_named(evaluator):
    ink, dusk, none = (scored(evaluator, style) for style in ("ink", "dusk", ""))
    assert none.mean("style") == pytest.approx(0, abs=0.05)
    assert ink.mean("style") > 0.5 > dusk.mean("style") and ink.mean("style") > none.mean("style")

    # Five of six pictures show the thing that nobody asked for there; CLIP sees most of them.
    planted = scored(evaluator, "ink", planted=5)
    assert planted.mean("leak") >= 0.5 and planted.mean("leak") > ink.mean("leak") + 0.2
    assert planted.leaked == "white rocket" and planted.score < ink.score
    assert report.build_scores_json(planted, ABOUT)["leaked"] == "white rocket"
    page = report.render_report(ink, ABOUT, evaluator.photos.pictures)
    assert f">{ink.interval('style')}<" in page
    assert "= style × (1 − the content leak above the base&#39;s) × CLIP-T" in page, "it said DINO"


def test_the_nearest_thing_counts_only_where_it_is_nearer_than_what_was_asked_for():
    one = torch.eye(3)
    found = metrics.find_leaked_things(one, one[[0, 0, 0]], one[[1, 2]])
    assert found.tolist() == [-1, 0, 1]


def test_a_style_has_a_name_and_no_class_and_its_captions_say_the_content():
    chosen = defaults.Choices({"subject": "style", "pretrained_model_name_or_path": "toy"})
    defaults.choose_prompts(chosen, "ink")
    assert chosen.settings["instance_prompt"] == "a picture in ink style"
    assert chosen.settings["with_prior_preservation"] is False
    assert "class_prompt" not in chosen.settings

    # Nothing of the recipe is left without effect.
    defaults.choose_recipe(chosen, None)
    assert "prior_loss_weight" in chosen.settings
    defaults.choose_prompts(chosen, "ink")
    assert not [name for name in chosen.settings if name.startswith("prior")]
    assert "Say nothing about how it is drawn" in captions.build_question(INK, "picture")
    said = ["a photo of a red duck on grass in ink style", "a picture in ink style"]
    assert collect_nouns(said) == ("red duck",)
