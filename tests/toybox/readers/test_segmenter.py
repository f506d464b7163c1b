"""The toy world's segmentation net: shapes, the loss, its training data, and how well the shipped net finds toys."""

import json
from pathlib import Path

import pytest
import torch

from dreambooth_moslora.photos.toy_readers import FILE, ToySegmenter, load_net
from toybox.data.render_dataset import Shard, write_shard
from toybox.data.renders import to_pixels
from toybox.learning import train_segmenter
from toybox.learning.train_segmenter import augment, fresh_scenes, iou, segmentation_loss
from toybox.render import render, toy_masks

NET = Path(__file__).resolve().parents[3] / "assets" / "toy-segmenter"


def test_the_shipped_net_is_small():
    assert (NET / FILE).stat().st_size <= 300_000


@pytest.mark.slow
def test_the_shipped_net_finds_fresh_toys():
    """A dozen here; `python -m toybox.learning.train_segmenter --net assets/toy-segmenter` measures hundreds."""
    scenes = fresh_scenes(12)
    found = load_net(NET).logits(to_pixels(render(scenes))) > 0
    assert iou(found, toy_masks(scenes, 128)).mean() > 0.9


def test_any_size_comes_back_in_its_own(tmp_path):
    net = ToySegmenter()
    for size in ((128, 128), (100, 333), (20, 16)):
        assert net.logits(torch.zeros(1, 3, *size)).shape == (1, *size)


def test_intersection_over_union_and_the_loss_know_right_from_wrong():
    truth = torch.zeros(2, 8, 8, dtype=torch.bool)
    truth[:, :4] = True
    shifted = truth.roll(2, 1)
    assert iou(truth, truth).tolist() == [1, 1] and iou(shifted, truth) == pytest.approx(2 / 6)
    right, wrong = (segmentation_loss(20 * (mask.float() - 0.5), truth) for mask in (truth, ~truth))
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
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "net"), "--batch", "4", "--evaluate", "2"]
    train_segmenter.main([*words, "--steps", "2"])
    masks = tmp_path / "net" / "masks" / "24.safetensors"
    made = masks.stat().st_mtime_ns
    train_segmenter.main([*words, "--steps", "3"])
    assert masks.stat().st_mtime_ns == made
    assert torch.load(tmp_path / "net" / "state.pt")["step"] == 3
    assert json.loads((tmp_path / "net" / "report.json").read_text())["parameters"] > 0
    load_net(tmp_path / "net" / "model")
