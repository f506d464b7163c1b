"""Photos of `--subject person`: crops near the face and far, remarks, and captions."""

import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image, ImageDraw

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.cli.terminal import EXIT_MISTAKE
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos import captions, faces
from dreambooth_moslora.photos.augment import NEAR_FACE_SHARE, CropRule, apply_crop
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.photo_file import open_rgb
from dreambooth_moslora.plan import defaults
from dreambooth_moslora.seeds import seed_rng
from dreambooth_moslora.settings import prompts
from dreambooth_moslora.settings.train_config import TrainConfig
from tests.helpers.stub_faces import READER, RIGHT, WRONG, painted, stub_faces  # noqa: F401

PERSON = TrainConfig(instance_prompt="a photo of sks woman", subject="person", resolution=64)
LARGE = {"size_px": (300, 400), "box": (100, 60, 160, 130)}


@pytest.fixture
def photos(tmp_path, stub_faces):  # noqa: F811
    painted(RIGHT, **LARGE).save(tmp_path / "a.png")
    painted(RIGHT, size_px=(300, 400), box=(280, 20, 292, 34)).save(tmp_path / "b.png")
    painted(None, size_px=(300, 400)).save(tmp_path / "c.png")
    return find_photos(tmp_path, PERSON.instance_prompt, PERSON.resolution).photos


def test_small_and_missing_faces_of_a_person_are_remarked(photos):
    checked_photos = faces.add_faces(PERSON, photos)
    assert checked_photos[0].face == (100, 60, 161, 131) and checked_photos[0].reasons == ()
    assert checked_photos[1].reasons == ("small face: 5% of the frame",)
    assert checked_photos[2].face is None and checked_photos[2].reasons == ("no face was found",)
    assert faces.add_faces(replace(PERSON, subject="thing"), photos) == photos


def test_a_second_person_is_remarked_and_a_passer_by_is_not(tmp_path, photos, capsys):
    for name, x0, x1 in (("d.png", 240, 280), ("e.png", 240, 260)):
        image = painted(RIGHT, **LARGE)
        ImageDraw.Draw(image).ellipse((x0, 60, x1, 60 + x1 - x0), fill=WRONG)
        image.save(tmp_path / name)
    remark = "2 faces: the largest is taken for the person's; crop the others away"
    flags = ["--base", "toy", "--subject", "person", "--resolution", "64"]
    assert main(["check", str(tmp_path), "woman", *flags, "--no_picture"]) == 0
    assert main(["train", str(tmp_path), "woman", *flags, "--dry_run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if remark in line]
    assert len(lines) == 2 and all("d.png" in line for line in lines)
    checked_photos = faces.add_faces(PERSON, find_photos(tmp_path, "sks woman", 64).photos)
    assert [remark in photo.reasons for photo in checked_photos] == [
        False,
        False,
        False,
        True,
        False,
    ]
    assert checked_photos[3].face == checked_photos[0].face


@pytest.mark.parametrize("flips", [False, True])
def test_half_of_the_crops_come_near_the_face_and_none_cuts_it(photos, flips):
    rule = CropRule(64, random_flip=flips)
    for photo in faces.add_faces(PERSON, photos)[:2]:
        near = 0
        for number in range(60):
            plan = rule.plan_crop(photo.size_px, seed_rng(number, "crop"), face=photo.face)
            x0, top, x1, bottom = plan.get_box(*photo.size_px[::-1])
            assert x0 <= photo.face[0] and x1 >= photo.face[2]
            assert top <= photo.face[1] and bottom >= photo.face[3]
            assert apply_crop(open_rgb(photo), plan).size == (64, 64)
            near += bottom - top < 299

        # The near ones are as near as the face, or as the photo's own pixels, allow.
        assert 15 < near < 45
        share = (photo.face[3] - photo.face[1]) / (bottom - top)
        assert near and share <= NEAR_FACE_SHARE + 0.02


def test_captions_omit_a_persons_traits_unless_described():
    thing = captions.build_question(replace(PERSON, subject="thing"), "woman")
    omitting = captions.build_question(PERSON, "woman")
    describing = captions.build_question(replace(PERSON, describe=("hair", "clothes")), "woman")
    assert "beard" not in thing and "Say nothing about how the woman itself looks" in thing
    assert "Do not mention hair, beard, glasses, make-up, clothes or the face" in omitting
    assert "woman's hair and clothes look" in describing
    assert "Do not mention beard, glasses, make-up or the face" in describing
    names = {captions.load_captioner(config).word for config in (PERSON, replace(PERSON,
        describe=("hair",)), replace(PERSON, subject="thing"))}  # fmt: skip
    assert len(names) == 3, "captions that say other traits are made again"


def test_a_person_has_context_prompts_and_the_class_person():
    contexts = prompts.list_context_prompts(
        replace(PERSON, pretrained_model_name_or_path="some/base", token="sks")
    )
    assert "a full-body photo of a sks woman on a city street" in contexts and len(contexts) == 4
    choices = defaults.Choices({"subject": "person"})
    defaults.choose_prompts(choices, "woman")
    defaults.choose_shapes(choices, [])
    assert choices.settings["class_prompt"] == "a photo of a person"
    assert choices.settings["crops_per_photo"] > 1


def test_without_the_weights_or_opencv_it_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="opencv"):
        faces.load_face_reader().find(Image.new("RGB", (64, 64)))


def test_opencv_keeps_its_warnings_to_itself():
    pytest.importorskip("cv2.utils.logging")
    line = "from dreambooth_moslora.photos.faces import load_face_reader; "
    line += "load_face_reader(); import cv2; "
    line += "print(cv2.utils.logging.getLogLevel() == cv2.utils.logging.LOG_LEVEL_ERROR)"
    assert subprocess.check_output([sys.executable, "-c", line], text=True) == "True\n"


def test_a_scored_run_without_face_weights_is_refused_early(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(faces, "load_face_reader", lambda: replace(READER, load=refuse))
    monkeypatch.chdir(tmp_path)
    folder = str(photos[0].path.parent)
    for last in ("--dry_run", "--no_dry_run"):
        command = ["train", folder, "woman", "--subject", "person", "--base", "toy", last]
        assert main([*command, "--evaluate_steps", "5"]) == EXIT_MISTAKE
        assert capsys.readouterr().err.endswith("error: no weights\n")
    assert not (tmp_path / "runs").exists()

    # Unasked, nothing is scored that needs a download.
    assert main([*command, "--dry_run"]) == 0
    assert "scores: none, as they take SFace from the hub" in capsys.readouterr().err


def refuse():
    raise UserError("no weights")
