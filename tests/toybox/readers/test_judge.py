"""The judge of pictures: its heads, what it learns from, what it counts as right, and what the shipped one reads."""

import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from toybox.readers import judge
from toybox.readers.judge import LABELS, ORNAMENTS, QUESTIONS, Judge, Reading, labels_of, loss_of, right_of, start_from
from toybox.render import render
from toybox.world import COLOURS, KINDS, PLACES, Scene, Toy, sample_scene, sample_toy

DUCK = Toy("duck", "red", "white", accessories=("scarf",))
SCENE = Scene((DUCK,), "on grass")
READING = Reading("duck", "red", "white", "on grass", frozenset({"scarf"}), (1.0,) * 5)


def test_there_is_an_answer_to_each_question():
    logits = Judge()(torch.zeros(2, 3, 128, 128))
    assert {name: tuple(values.shape) for name, values in logits.items()} == {
        **{name: (2, len(names)) for name, names in LABELS.items()},
        "ornaments": (2, 5),
    }
    (reading,) = Judge().read(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    assert reading.ornaments <= set(ORNAMENTS) and len(reading.confidence) == len(QUESTIONS)


def test_a_reading_is_right_in_ornaments_when_all_and_no_others_are_read():
    assert READING.right(SCENE) == dict.fromkeys(QUESTIONS, True)
    for wrong in ({"scarf", "bow"}, {"bow"}, set()):
        found = replace(READING, ornaments=frozenset(wrong)).right(SCENE)
        assert [name for name in QUESTIONS if not found[name]] == ["ornaments"]
    for name, other in (("kind", "bear"), ("colour", "blue"), ("colour2", "black"), ("place", "on lava")):
        assert [n for n, hit in replace(READING, **{name: other}).right(SCENE).items() if not hit] == [name]


def test_logits_of_the_truth_are_read_as_the_truth(monkeypatch):
    truth = labels_of([{"scene": SCENE.to_dict()}])
    logits = {name: torch.nn.functional.one_hot(truth[name], len(LABELS[name])) * 50.0 for name in LABELS}
    logits["ornaments"] = (truth["ornaments"] - 0.5) * 100
    assert all(hits.all() for hits in right_of(logits, truth).values()) and float(loss_of(logits, truth)) < 1e-6
    net = Judge()
    monkeypatch.setattr(net, "forward", lambda pixels: dict(logits))
    assert net.read(torch.zeros(1, 128, 128, 3, dtype=torch.uint8)) == [READING]


def test_labels_are_of_the_first_toy():
    other = Toy("bear", "blue", "pink", accessories=("bow",))
    scenes = [SCENE, Scene((other, DUCK), "on lava")]
    found = labels_of([{"scene": scene.to_dict()} for scene in scenes])
    assert found["kind"].tolist() == [KINDS.index("duck"), KINDS.index("bear")]
    assert found["colour2"].tolist() == [list(COLOURS).index("white"), list(COLOURS).index("pink")]
    assert found["place"].tolist() == [PLACES.index("on grass"), PLACES.index("on lava")]
    assert found["ornaments"].tolist() == [[float(name == worn) for name in ORNAMENTS] for worn in ("scarf", "bow")]


def test_an_earlier_judge_without_the_new_heads_is_gone_on_from(tmp_path):
    earlier = {k: v for k, v in Judge().state_dict().items() if "colour2" not in k and "ornaments" not in k}
    save_file(earlier, tmp_path / "old.safetensors")
    found = start_from(tmp_path / "old.safetensors").state_dict()
    assert all(torch.equal(found[name], value) for name, value in earlier.items()) and len(found) > len(earlier)
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not a judge: other"):
        start_from(tmp_path / "other.safetensors")


def test_the_shipped_judge_is_small_and_has_all_heads():
    assert judge.WEIGHTS.stat().st_size < 2_000_000
    judge.load()


@pytest.mark.slow
def test_the_shipped_judge_reads_what_fresh_toys_wear():
    rng = random.Random(5)
    toys = [sample_toy(rng, "duck", accessories=(name,)) for name in ORNAMENTS[:4] * 8]
    scenes = [replace(sample_scene(rng, toy, held_out=None), light="day") for toy in toys]
    right = [reading.right(scene) for reading, scene in zip(judge.load().read(render(scenes)), scenes)]
    share = {name: sum(hits[name] for hits in right) / len(right) for name in QUESTIONS}
    assert share["ornaments"] > 0.7 and share["colour2"] > 0.7 and share["kind"] > 0.9, share
