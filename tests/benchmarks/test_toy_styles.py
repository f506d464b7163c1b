"""The truth by which the toy world's styles are judged."""

import pytest
from PIL import Image

from benchmarks import toy_styles
from benchmarks.toy_styles import PHOTOS, alterations, write_photos
from toybox.styles import STYLES


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_a_style_alters_less_what_has_it_already(tmp_path, style, monkeypatch):
    monkeypatch.setattr(toy_styles, "PHOTO_PX", 64)
    write_photos(tmp_path / "own", style, "many")
    other = next(name for name in STYLES if name != style)
    write_photos(tmp_path / "others", other, "many")

    def of(folder):
        files = sorted((tmp_path / folder).glob("*.png"))
        assert len(files) == PHOTOS == len(list((tmp_path / folder).glob("*.txt")))
        return alterations([Image.open(file) for file in files], style).mean()

    assert of("own") < of("others") / 3
