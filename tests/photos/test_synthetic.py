"""Photos that a model made: their record, their weight in the loss, and remarks on them."""

import logging
from random import Random

import pytest
import torch
from PIL import Image

from dreambooth_moslora.base import load
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.photos.augment import CropRule
from dreambooth_moslora.photos.folder import build_photo_report, find_photos
from dreambooth_moslora.photos.synthetic import (
    RECORD_NAME,
    REJECTED_NAME,
    SyntheticRecord,
    describe_synthetic,
    read_record,
    write_record,
)
from dreambooth_moslora.training.dataset import PhotoEncoder
from dreambooth_moslora.training.dry_run import format_photos
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.objective import compute_image_errors
from tests.helpers.tiny_training import logged, paint_photos, tiny_config

RECORD = SyntheticRecord(
    base="owner/editor",
    licence="Apache-2.0",
    prompt="a photo of a dog",
    seed=0,
    made_from="",
    likeness=0.8,
    rejected="",
)
REMARK = (
    "2 of 3 photos were made by owner/editor, licence Apache-2.0; "
    "their loss has the weight 0.5 (--synthetic_weight)"
)


@pytest.fixture
def folder(tmp_path):
    """Return a folder of three photos, two of them synthetic, with a rejected one."""
    folder = paint_photos(tmp_path / "photos")
    paint_photos(folder / REJECTED_NAME, count=1)
    write_record(folder, {"1.png": RECORD, "2.png": RECORD, "gone.png": RECORD})
    return folder


def test_a_folder_names_the_maker_of_its_synthetic_photos(folder):
    report = find_photos(folder, "a photo of sks dog", 64)
    makers = [photo.made_by for photo in report.photos]
    assert makers == ["", "owner/editor, licence Apache-2.0", "owner/editor, licence Apache-2.0"]
    assert not report.skipped and read_record(folder)["1.png"] == RECORD

    # One of somebody else is told in one line without control characters.
    makers = {**RECORD, "base": "x\n\n# Title\r\x1b[2J" + "y" * 900}
    write_record(folder, {"1.png": makers})
    by = find_photos(folder, "a photo of sks dog", 64).photos[1].made_by
    assert by.startswith("x # Title \\x1b[2Jyyy") and len(by) < 250 and by.isprintable()

    # A damaged record stops nothing, and is told.
    (folder / RECORD_NAME).write_text('{"1.png": {}}')
    report = find_photos(folder, "a photo of sks dog", 64)
    assert len(report.photos) == 3 and [item.path.name for item in report.skipped] == [RECORD_NAME]


def test_the_loss_of_a_synthetic_photo_is_scaled_by_its_weight(folder, tiny_base):
    vae = load.load_pipeline(tiny_base).vae
    half = torch.zeros(64, 64)
    half[:, :32] = 255
    Image.fromarray(half.byte().numpy()).resize((72, 72)).save(folder / "2.mask.png")
    photos = find_photos(folder, "a photo of sks dog", 64).photos
    rule = CropRule(64, center_crop=True)
    for photo, factor in zip(photos, (1.0, 0.25, 0.25)):
        plan = rule.plan_crop(photo.size_px, Random(0))
        errors = []
        for weight in (1.0, 0.25):
            encoder = PhotoEncoder(vae, None, rule, unmasked_weight=0.2, synthetic_weight=weight)
            view = encoder.encode(photo, plan)
            answer = torch.randn(view.latents.shape, generator=torch.Generator().manual_seed(1))
            mask = None if view.mask is None else view.mask[None]
            errors.append(compute_image_errors(answer[None], view.latents[None], mask))
        torch.testing.assert_close(errors[1], factor * errors[0], rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
def test_a_run_weighs_synthetic_photos_and_its_card_says_so(folder, tiny_base, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    losses = {}
    for weight in (1.0, 0.5):
        run = tmp_path / f"run_{weight}"
        config = tiny_config(
            tiny_base,
            folder,
            run,
            max_train_steps=3,
            synthetic_weight=weight,
            learning_rate=1e-9,
            crops_per_photo=1,
        )
        train(config)
        losses[weight] = [event["loss"] for event in logged(run)]
    assert REMARK in caplog.text and f"{REMARK}." in RunDir(run).read_card()
    assert REMARK in format_photos(config, build_photo_report(config))

    # Each epoch of three steps shows each photo once: one is real, two are made.
    ratios = [half / whole for half, whole in zip(losses[0.5], losses[1.0])]
    assert sorted(ratios) == pytest.approx([0.5, 0.5, 1.0], rel=1e-3)


def test_nothing_is_said_of_real_photos(tmp_path, tiny_base):
    photos = find_photos(paint_photos(tmp_path / "photos"), "a photo of sks dog", 64).photos
    assert describe_synthetic(photos, 0.5) == []
