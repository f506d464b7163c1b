"""The measures of the base: what a prompt tells, shares with their intervals, and pictures that are kept."""

from types import SimpleNamespace

import pytest
import torch

from toybox.captions import full_caption
from toybox.measures import evaluate_base
from toybox.measures.evaluate_base import accuracy, kept_pictures, scenes_for, tells, wilson
from toybox.readers.judge import QUESTIONS, Reading
from toybox.world import Scene, Toy

PLAIN = Scene((Toy("duck", "red", "white"),), "on grass")
DRESSED = Scene((Toy("duck", "red", "white", accessories=("scarf",)),), "on grass")
STRIPED = Scene((Toy("duck", "red", "white", "striped"),), "on grass")


def test_a_question_is_asked_where_the_prompt_tells_the_answer():
    names = lambda scene, full: {name for name, told in tells(scene, full).items() if told}  # noqa: E731
    assert names(PLAIN, False) == set(QUESTIONS) - {"colour2"}
    assert names(DRESSED, False) == set(QUESTIONS) - {"colour2", "ornaments"}
    assert names(STRIPED, False) == names(DRESSED, True) == set(QUESTIONS)


def test_shares_are_of_the_pictures_that_are_asked(monkeypatch):
    readings = [
        Reading("duck", "red", "blue", "on grass", frozenset(), (1.0,) * 5),
        Reading("duck", "blue", "white", "on grass", frozenset({"scarf"}), (1.0,) * 5),
        Reading("duck", "red", "white", "on grass", frozenset({"bow"}), (1.0,) * 5),
    ]
    monkeypatch.setattr(evaluate_base.judge, "load", lambda: SimpleNamespace(read=lambda images: readings))
    images, scenes = torch.zeros(3, 8, 8, 3), [PLAIN, DRESSED, STRIPED]
    found = accuracy(images, scenes)
    assert found["kind"] == 1 and found["colour"] == found["all"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["colour2"] == 1 and found["ornaments"] == 0.5 and "ornaments_worn" not in found
    assert found["intervals"]["colour2"] == (*wilson(1, 1), 1) and found["intervals"]["ornaments"][2] == 2
    named = accuracy(images, scenes, full=True)
    assert named["colour2"] == named["ornaments"] == pytest.approx(2 / 3, abs=1e-4) and named["ornaments_worn"] == 1


def test_the_interval_of_a_share_is_wilsons():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1


def test_scenes_that_are_told_in_full_have_a_pattern_or_an_ornament_and_their_captions_name_it():
    for scene in scenes_for(40, held_out=False, seed=1, full=True):
        (toy,) = scene.toys
        words = full_caption(scene)
        assert toy.pattern != "plain" or toy.accessories
        assert all(name in words for name in (toy.kind, toy.colour2, scene.place, *toy.accessories))
    assert full_caption(DRESSED) == "a photo of a red duck with white parts and a red scarf on grass"
    assert full_caption(STRIPED) == "a photo of a red and white striped duck on grass"


def test_pictures_are_drawn_once(tmp_path, monkeypatch):
    calls = []

    def generate(pipeline, prompts, **options):
        calls.append((prompts, options))
        return torch.full((len(prompts), 2, 2, 3), 7, dtype=torch.uint8)

    monkeypatch.setattr(evaluate_base, "generate", generate)
    first, second = (kept_pictures(tmp_path / "a_at_2.5.npy", None, ["x", "y"], seed=1) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (2, 2, 2, 3) and calls == [(["x", "y"], {"seed": 1})]
