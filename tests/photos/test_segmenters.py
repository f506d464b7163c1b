"""The models that make masks: a random CLIPSeg as a folder, and the toy world's own net on toys."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.names import find_asset
from dreambooth_moslora.photos.mask_making import Segmenter, load_segmenter
from dreambooth_moslora.photos.masks import CLIPSEG, grey_mask, sought_word
from dreambooth_moslora.photos.photo import open_image
from dreambooth_moslora.settings.table import TrainConfig
from tests.helpers.odd_photos import picture
from tests.helpers.tiny_clipseg import save_tiny_clipseg
from toybox.learning.train_segmenter import iou

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory) -> str:
    return str(save_tiny_clipseg(tmp_path_factory.mktemp("clipseg")))


def config_of(**settings) -> TrainConfig:
    return TrainConfig(**{"pretrained_model_name_or_path": SDXL, "instance_prompt": "a photo of sks dog", **settings})


def test_clipseg_is_asked_for_the_class_word_or_for_the_prompt(clipseg):
    image = picture()
    seen = {}
    for word in ("dog", "cat"):
        found = load_segmenter(config_of(mask_model=clipseg, mask_prompt=word)).probabilities(image)
        assert found.shape == (image.height, image.width) and found.dtype == torch.float32
        seen[word] = found
    dog = load_segmenter(config_of(mask_model=clipseg)).probabilities(image)
    assert torch.equal(dog, seen["dog"]) and not torch.equal(dog, seen["cat"])


@pytest.mark.parametrize(("peak", "share"), [(0.1, 0.0), (0.3, 0.5), (0.99, 0.5)])
def test_a_mask_begins_at_half_of_the_highest_probability_and_is_black_without_a_peak(peak, share):
    found = torch.full((8, 16), 0.4 * peak)
    found[:, :8] = peak
    mask = np.asarray(Segmenter("x", "dog", lambda image: found).mask(Image.new("RGB", (16, 8))))
    assert mask.shape == (8, 16) and (mask > 127).mean() == share and set(np.unique(mask)) <= {0, 255}


def test_an_absent_model_and_a_foreign_one_are_one_line(clipseg, tmp_path):
    with pytest.raises(UserError, match="CIDAS/clipseg-rd64-refined is not here and cannot be fetched"):
        load_segmenter(config_of()).mask(picture())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--mask_model"):
        load_segmenter(config_of(mask_model=str(tmp_path))).mask(picture())


def test_without_a_word_clipseg_has_nothing_to_look_for_and_the_toy_net_needs_none():
    with pytest.raises(UserError, match="--mask_prompt"):
        sought_word(config_of(instance_prompt="sks"))
    assert sought_word(config_of(pretrained_model_name_or_path="toy", instance_prompt="sks")) == ""
    assert sought_word(config_of(pretrained_model_name_or_path="toy", mask_model=CLIPSEG)) == "dog"


def test_the_toy_net_finds_the_sample_subjects():
    """None of them is in its training; eight photos of 512 px against their true masks."""
    segmenter = load_segmenter(config_of(pretrained_model_name_or_path="toy"))
    found, true = [], []
    for path in sorted(Path(find_asset("assets/subjects")).glob("*/00.jpg")):
        found.append(np.asarray(segmenter.mask(open_image(path))))
        true.append(np.asarray(grey_mask(open_image(path.with_name("00.mask.png")))))
    scores = iou(*(torch.from_numpy(np.stack(masks)) > 127 for masks in (found, true)))
    assert len(scores) == 8 and scores.mean() > 0.88 and scores.min() > 0.7
