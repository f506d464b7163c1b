"""The photos of the studies of masks, captions and buckets, and of the instance prompt's share."""

import pytest
from PIL import Image, ImageDraw

from tools.bare_photos import cut, main


def photo_and_mask(box) -> tuple[Image.Image, Image.Image]:
    mask = Image.new("L", (80, 80))
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return Image.merge("RGB", [mask] * 3), mask


def test_a_photo_is_cut_around_its_subject():
    photo, mask = photo_and_mask((4, 60, 20, 75))  # at the left, low
    wide, tall = cut(photo, mask, wide=True), cut(photo, mask, wide=False)
    assert wide.size == (80, 60) and tall.size == (60, 80)
    white = mask.histogram()[255]
    assert [one.convert("L").histogram()[255] for one in (wide, tall)] == [white, white]


def test_a_subject_in_the_middle_stays_there():
    photo, mask = photo_and_mask((30, 35, 49, 44))
    assert cut(photo, mask, wide=True).getbbox() == (30, 25, 50, 35)
    assert cut(photo, mask, wide=False).getbbox() == (20, 35, 40, 45)


@pytest.mark.slow
def test_captions_are_made_by_the_program_and_all_name_a_place(tmp_path):
    main(["--captions", "--out", str(tmp_path), "--subjects", "tall_cactus"])
    captions = [path.read_text().strip() for path in (tmp_path / "tall_cactus").glob("*.txt")]
    assert len(captions) == 5 and all(text.startswith("a photo of a sks cactus ") for text in captions)
    assert len(list((tmp_path / "tall_cactus").glob("*.mask.png"))) == 5
