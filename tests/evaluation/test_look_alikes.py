"""The place of the true subject among individuals that look like it."""

import random
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from dreambooth_moslora.evaluation import metrics, report
from dreambooth_moslora.evaluation.score_tables import Evaluator
from dreambooth_moslora.training import explain
from tests.evaluation.test_score_tables import (
    ABOUT,
    PLAN,
    TOY,
    all_of,
    toy_pictures,
    with_subject,
)
from tests.training.test_explain import GOOD
from toybox.truth import LOOK_ALIKES, find_truth, look_alike


def test_the_rank_counts_the_individuals_that_are_nearer():
    """Each points into a direction of its own."""
    one = torch.eye(4)
    between = normalize(one[1] + 0.9 * one[2], dim=0)
    found = metrics.lookalike_rank(
        torch.stack([one[0], one[1], between, one[3]]), one[:1], [one[1:2], one[2:3]]
    )
    assert found.tolist() == [1, 2, 3, 1]


@pytest.fixture(scope="module")
def encoders():
    return metrics.load_encoders("toy")


def test_true_pictures_are_first_and_a_look_alikes_are_not(encoders, tmp_path):
    """The toy's look-alikes are rendered; of others a folder has them."""
    places = ["on the beach", "in the snow", "on lava"]
    photos = toy_pictures(TOY, places)
    true = toy_pictures(TOY, places, seed=1)
    evaluator = Evaluator(PLAN, encoders, photos)
    evaluator.truth = find_truth(with_subject(tmp_path), encoders, size_px=64)
    rendered = evaluator.truth.look_alikes()
    assert len(rendered) == LOOK_ALIKES and rendered == evaluator.truth.look_alikes()

    # From a folder of folders, the truth aside
    evaluator.truth = None
    report.find_look_alikes([evaluator], None)
    assert evaluator.look_alikes == []
    folder = tmp_path / "look-alikes"
    for number, pictures in enumerate(rendered):
        (folder / str(number)).mkdir(parents=True)
        for place, picture in enumerate(pictures):
            picture.save(folder / str(number) / f"{place}.png")
    report.find_look_alikes([evaluator], folder)
    assert len(evaluator.look_alikes) == LOOK_ALIKES

    found, other = evaluator(all_of(*true)), evaluator(all_of(*rendered[0]))
    assert found.mean("rank") < 2 < other.mean("rank")
    assert f">{found.interval('rank')}<" in report.report_html(found, ABOUT, photos)
    scores = report.scores_json(other, ABOUT)["scores"]
    run = replace(GOOD, scores=GOOD.scores | {name: one["mean"] for name, one in scores.items()})
    assert any("look-alikes are nearer" in line for line in explain.advice_after(run))
    assert any("rank among look-alikes" in line for line in explain.meanings(run))


def test_a_look_alike_is_of_the_same_kind_and_colour():
    others = [look_alike(TOY, random.Random(seed)) for seed in range(20)]
    assert {(one.kind, one.colour) for one in others} == {("duck", "pink")} and TOY not in others
