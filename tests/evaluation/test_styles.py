"""Score and leak of a style, against truth: the toy world is rendered in two styles."""

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
PROMPTED = (
    ("yellow", "duck", "on the beach"),
    ("blue", "car", "on a city street"),
    ("red", "rocket", "in the snow"),
    ("green", "dinosaur", "on a wooden floor"),
    ("white", "teapot", "in a kitchen"),
    ("purple", "robot", "in the desert"),
)
"""Colour, kind and place of each toy in the toy world's prompts of styles."""


def render_toys(toys: list[Toy], places: list[str], style: str = "", seed: int = 0) -> list:
    rng = random.Random(seed)
    scenes = [sample_scene(rng, toy, place, held_out=None) for toy, place in zip(toys, places)]
    pictures = [STYLES[style](image) if style else image for image in render(scenes, 64)]
    return [Image.fromarray(picture.numpy()) for picture in pictures]


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    """Return an evaluator of the ink style, whose images all show a white rocket."""
    places = ["on grass", "in a forest", "on the moon", "on lava"]
    photos = render_toys([ROCKET] * 4, places, "ink")
    caption_texts = [f"a photo of a white rocket {place} in ink style" for place in places]
    style_photos = [
        Photo(f"{n}.png", (64, 64), (caption,)) for n, caption in enumerate(caption_texts)
    ]
    plan = build_subject_plan(INK, style_photos, seeds=(0,))
    assert (
        plan.things == ("white rocket",)
        and plan.texts[0] == "a photo of a yellow duck on the beach"
    )
    assert "in ink style" in plan.subject_requests[0].prompt and not plan.class_requests
    return Evaluator(plan, metrics.load_encoders("toy"), photos)


def evaluate_style(
    evaluator: Evaluator, style: str, planted: int = 0, base_style: str = ""
) -> Evaluation:
    """Evaluate the prompted toys in a style; `planted` of them are white rockets instead."""

    def draw(requests, with_adapter):
        rng = random.Random(1)
        repeats = len(requests) // len(PROMPTED) or 1
        prompted = [toy for toy in PROMPTED for _ in range(repeats)][: len(requests)]
        toys = [sample_toy(rng, kind, colour=colour) for colour, kind, _ in prompted]
        if with_adapter:
            toys[:planted] = [ROCKET] * planted
        places = [place for *_, place in prompted]
        return render_toys(toys, places, style if with_adapter else base_style, seed=2)

    return evaluator(draw)


def test_a_style_of_the_base_has_no_score_and_a_reason(evaluator):
    inked = copy(evaluator)
    inked._base = {}
    unscored = evaluate_style(inked, "ink", base_style="ink")
    reason = "about as like the photos' style as the photos are to each other"
    assert unscored.score is None and "style" not in unscored.tables and "leak" in unscored.tables
    assert f"no score: {metrics.NO_STYLE_SCORE}" in format_summary(unscored)
    scores = report.build_scores_json(unscored, ABOUT)
    assert scores["score"] is None and reason in scores["no_score"]
    page = report.render_report(unscored, ABOUT, inked.photos.pictures)
    assert reason.replace("'", "&#39;") in page and "<b>Score" not in page
    assert (
        "score" not in unscored.list_logged_scores() and unscored.list_logged_scores()["leak"] >= 0
    )
    whole = evaluate_style(evaluator, "ink")
    assert report.build_scores_json(whole, ABOUT)[
        "no_score"
    ] == "" and "no score" not in format_summary(whole)

    # The score of several subjects is the mean of those that have one.
    merged = report.merge_evaluations([unscored, whole])
    assert merged.score == whole.score and merged.no_score == unscored.no_score
    assert report.merge_evaluations([unscored, unscored]).score is None


@pytest.mark.slow
def test_styles_are_told_apart_and_a_leaked_thing_is_named(evaluator):
    ink, dusk, none = (evaluate_style(evaluator, style) for style in ("ink", "dusk", ""))
    assert none.mean("style") == pytest.approx(0, abs=0.05)
    assert ink.mean("style") > 0.5 > dusk.mean("style") and ink.mean("style") > none.mean("style")

    # Five of six images show the unprompted thing; CLIP recognises most of them.
    planted = evaluate_style(evaluator, "ink", planted=5)
    assert planted.mean("leak") >= 0.5 and planted.mean("leak") > ink.mean("leak") + 0.2
    assert planted.leaked == "white rocket" and planted.score < ink.score
    assert report.build_scores_json(planted, ABOUT)["leaked"] == "white rocket"
    page = report.render_report(ink, ABOUT, evaluator.photos.pictures)
    assert f">{ink.interval('style')}<" in page
    assert "= style × (1 − the content leak above the base&#39;s) × CLIP-T" in page, "it said DINO"


def test_a_thing_leaks_only_if_nearer_than_the_prompted_one():
    vectors = torch.eye(3)
    leaked = metrics.find_leaked_things(vectors, vectors[[0, 0, 0]], vectors[[1, 2]])
    assert leaked.tolist() == [-1, 0, 1]


def test_a_style_has_a_name_no_class_and_content_captions():
    choices = defaults.Choices({"subject": "style", "pretrained_model_name_or_path": "toy"})
    defaults.choose_prompts(choices, "ink")
    assert choices.settings["instance_prompt"] == "a picture in ink style"
    assert choices.settings["with_prior_preservation"] is False
    assert "class_prompt" not in choices.settings

    # Settings of the prior are removed, as they have no effect.
    defaults.choose_recipe(choices, None)
    assert "prior_loss_weight" in choices.settings
    defaults.choose_prompts(choices, "ink")
    assert not [name for name in choices.settings if name.startswith("prior")]
    assert "Say nothing about how it is drawn" in captions.build_question(INK, "picture")
    texts = ["a photo of a red duck on grass in ink style", "a picture in ink style"]
    assert collect_nouns(texts) == ("red duck",)
