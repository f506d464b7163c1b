"""The judge and the segmenter: shapes, what they learn from, what counts as right, and what the
shipped ones find."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dreambooth_moslora.photos.toy_readers import WEIGHTS_NAME, load_segmenter_net
from toybox.data.render_dataset import Shard, write_shard
from toybox.data.renders import to_pixels
from toybox.learning import train_segmenter
from toybox.learning.train_segmenter import (
    augment,
    compute_segmentation_loss,
    iou,
    sample_fresh_scenes,
)
from toybox.readers import judge
from toybox.readers.judge import (
    LABELS,
    ORNAMENTS,
    QUESTIONS,
    Judge,
    Reading,
    build_labels,
    compare_answers,
    compute_loss,
)
from toybox.render import render, render_masks
from toybox.world import COLOURS, KINDS, PLACES, Scene, Toy, sample_scene, sample_toy

DUCK = Toy("duck", "red", "white", accessories=("scarf",))
SCENE = Scene((DUCK,), "on grass")
READING = Reading("duck", "red", "white", "on grass", frozenset({"scarf"}), (1.0,) * 5)
NET = Path(__file__).resolve().parents[2] / "assets" / "toy-segmenter"


def test_ornaments_are_right_when_all_worn_and_no_more_are_read():
    assert READING.check_answers(SCENE) == dict.fromkeys(QUESTIONS, True)
    for wrong in ({"scarf", "bow"}, {"bow"}, set()):
        answers = replace(READING, ornaments=frozenset(wrong)).check_answers(SCENE)
        assert [name for name in QUESTIONS if not answers[name]] == ["ornaments"]
    for name, changed_scene in (
        ("kind", "bear"),
        ("colour", "blue"),
        ("colour2", "black"),
        ("place", "on lava"),
    ):
        assert [
            n
            for n, hit in replace(READING, **{name: changed_scene}).check_answers(SCENE).items()
            if not hit
        ] == [name]


def test_logits_of_the_truth_are_read_as_the_truth(monkeypatch):
    truth = build_labels([{"scene": SCENE.to_dict()}])
    logits = {
        name: torch.nn.functional.one_hot(truth[name], len(LABELS[name])) * 50.0 for name in LABELS
    }
    logits["ornaments"] = (truth["ornaments"] - 0.5) * 100
    assert (
        all(hits.all() for hits in compare_answers(logits, truth).values())
        and float(compute_loss(logits, truth)) < 1e-6
    )
    net = Judge()
    monkeypatch.setattr(net, "forward", lambda pixels: dict(logits))
    assert net.read(torch.zeros(1, 128, 128, 3, dtype=torch.uint8)) == [READING]


def test_labels_are_of_the_first_toy():
    bear = Toy("bear", "blue", "pink", accessories=("bow",))
    labels = build_labels([{"scene": Scene((bear, DUCK), "on lava").to_dict()}])
    assert labels["kind"].tolist() == [KINDS.index("bear")] and labels["place"].tolist() == [
        PLACES.index("on lava")
    ]
    assert labels["colour2"].tolist() == [list(COLOURS).index("pink")]
    assert labels["ornaments"].tolist() == [[float(name == "bow") for name in ORNAMENTS]]


def test_the_shipped_nets_are_small_and_the_judge_has_all_heads():
    assert (
        judge.WEIGHTS_PATH.stat().st_size < 2_000_000
        and (NET / WEIGHTS_NAME).stat().st_size <= 300_000
    )
    judge.load()


@pytest.mark.slow
def test_the_shipped_judge_reads_what_fresh_toys_wear():
    rng = random.Random(5)
    toys = [sample_toy(rng, "duck", accessories=(name,)) for name in ORNAMENTS[:4] * 8]
    scenes = [replace(sample_scene(rng, toy, held_out=None), light="day") for toy in toys]
    right = [
        reading.check_answers(scene)
        for reading, scene in zip(judge.load().read(render(scenes)), scenes)
    ]
    share = {name: sum(hits[name] for hits in right) / len(right) for name in QUESTIONS}
    assert share["ornaments"] > 0.7 and share["colour2"] > 0.7 and share["kind"] > 0.9, share


@pytest.mark.slow
def test_the_shipped_net_finds_fresh_toys():
    """A dozen here; `python -m toybox.learning.train_segmenter --net assets/toy-segmenter` measures
    hundreds."""
    scenes = sample_fresh_scenes(12)
    masks = load_segmenter_net(NET).compute_logits(to_pixels(render(scenes))) > 0
    assert iou(masks, render_masks(scenes, 128)).mean() > 0.9


def test_iou_and_loss_of_right_and_wrong_masks():
    truth = torch.zeros(2, 8, 8, dtype=torch.bool)
    truth[:, :4] = True
    shifted = truth.roll(2, 1)
    assert iou(truth, truth).tolist() == [1, 1] and iou(shifted, truth) == pytest.approx(2 / 6)
    right, wrong = (
        compute_segmentation_loss(20 * (mask.float() - 0.5), truth) for mask in (truth, ~truth)
    )
    assert right < 0.01 and wrong > 10


def test_pictures_and_masks_are_cropped_and_mirrored_together():
    masks = torch.zeros(8, 128, 128, dtype=torch.bool)
    masks[:, 20:90, 10:60] = True
    pixels = torch.where(masks[:, None], 0.9, -0.9).expand(8, 3, 128, 128)
    views, truth = augment(pixels, masks, torch.Generator().manual_seed(1))
    bright = views.mean(1) > views.mean((1, 2, 3))[:, None, None]
    assert iou(bright, truth).min() > 0.9 and len({int(mask.sum()) for mask in truth}) > 4


@pytest.mark.slow
def test_it_is_trained_on_renders_and_goes_on(tmp_path, capsys):
    write_shard(Shard(tmp_path, 0, 24, 1, 128, "cpu", compiled=False))
    arguments = [
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "net"),
        "--batch",
        "4",
        "--evaluate",
        "2",
    ]
    train_segmenter.main([*arguments, "--steps", "2"])
    masks = tmp_path / "net" / "masks" / "24.safetensors"
    stamp = masks.stat().st_mtime_ns
    train_segmenter.main([*arguments, "--steps", "3"])
    assert masks.stat().st_mtime_ns == stamp
    assert torch.load(tmp_path / "net" / "state.pt")["step"] == 3
    assert json.loads((tmp_path / "net" / "report.json").read_text())["parameters"] > 0
    load_segmenter_net(tmp_path / "net" / "model")
