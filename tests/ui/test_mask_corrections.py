"""Masks on the page: shown as the run will have them, corrected with a brush, and kept with their photos."""

import io
from pathlib import Path
from types import SimpleNamespace

import fastapi
import gradio as gr
import numpy as np
import PIL.Image
import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.masks import open_mask
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.ui import train_masks as mask_editor
from dreambooth_moslora.ui import train_photos as mask_corrections
from dreambooth_moslora.ui.train_form import TrainForm
from dreambooth_moslora.ui.train_photos import (
    EDIT_PX,
    LEARNED,
    LEFT_OUT,
    editor_picture,
    keep_mask,
    place_of,
    put_back,
    review_kept,
    shown_masks,
    take_with_masks,
)
from tests.ui.test_handlers import visitor

ROCKET = Path(__file__).parents[2] / "assets" / "subjects" / "rocket"


@pytest.fixture
def ann(tmp_path):
    """A visitor with two toy photos, the first of which has a mask of its own."""
    person = visitor(tmp_path)
    files = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    for number, file in enumerate(files):
        file.write_bytes((ROCKET / f"0{number}.jpg").read_bytes())
    with PIL.Image.open(files[0]) as photo:
        left = PIL.Image.new("L", photo.size, 0)
        left.paste(255, (0, 0, photo.width // 2, photo.height))
    left.save(tmp_path / "a.mask.png")
    take_with_masks([str(path) for path in (*files, tmp_path / "a.mask.png")], person)
    return person


def config_of(ann, **form) -> TrainConfig:
    form = TrainForm("sks", "rocket", **form)
    return TrainConfig.from_dict(form.config("toy", 128, ann.photos_dir, ann.root / "run"))


WHOLE = (0, 0, 9999, 9999)


def painted(ann, *boxes: tuple[int, int, int, int]) -> PIL.Image.Image:
    """The layer on which all is taken away but boxes in px of the first photo, as the page sends it."""
    with PIL.Image.open(ann.photos_dir / "photo_01.png") as photo:
        left, top, right, _ = place_of(photo.size)
        scale = (right - left) / photo.width
    layer = PIL.Image.new("RGBA", (EDIT_PX, EDIT_PX), (*LEFT_OUT, 150))
    for box in boxes:
        layer.paste(
            (*LEARNED, 150), tuple(min(EDIT_PX, round(scale * s) + (left, top)[n % 2]) for n, s in enumerate(box))
        )
    return layer


def keep(ann, name: str, layer: PIL.Image.Image) -> str:
    """The remark on the mask that is kept."""
    keep_mask(ann, name, layer, config_of(ann))
    return next(mask.remark for mask in shown_masks(config_of(ann), ann) if mask.photo == name)


def mask_of(ann, number: int = 0) -> np.ndarray:
    return np.asarray(open_mask(find_photos(ann.photos_dir, "", 128).photos[number])) > 127


def test_masks_are_shown_as_the_run_has_them(ann):
    given, made = shown_masks(config_of(ann), ann)
    assert (given.photo, given.remark, made.remark) == ("photo_01.png", "", "")
    assert not (ann.photos_dir / "photo_02.mask.png").exists()  # the run makes it, as it was shown
    white = np.asarray(given.picture).mean(axis=(0, 2))
    assert white[: len(white) // 2].mean() > 2 * white[len(white) // 2 :].mean()
    bare = list(shown_masks(config_of(ann, make_masks=False), ann))
    assert [mask.remark for mask in bare] == ["", "no mask: all of it is learned"]


def test_a_corrected_mask_is_the_photos_in_the_run_in_the_crops_and_after_another_intake(ann, tmp_path):
    picture = np.asarray(editor_picture(ann, "photo_02.png", config_of(ann)), dtype=int)
    untinted = np.asarray(editor_picture(ann, "photo_02.png", config_of(ann, make_masks=False)), dtype=int)
    share = (picture != untinted).any(axis=2).mean()
    assert picture.shape == (EDIT_PX, EDIT_PX, 3) and 0.02 < share < 0.6
    ctx = SimpleNamespace(base_name="toy", resolution_px=128)
    before = [np.asarray(crop) for crop, _ in review_kept(ctx, ann).crops]
    assert keep(ann, "photo_01.png", painted(ann, (8, 8, 60, 90))) == ""
    rows, columns = np.where(mask_of(ann))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 89, 8, 59)
    after = [np.asarray(crop) for crop, _ in review_kept(ctx, ann).crops]
    assert not np.array_equal(before[0], after[0]) and np.array_equal(before[1], after[1])
    corrected = mask_of(ann)
    take_with_masks([str(tmp_path / "b.jpg"), str(tmp_path / "a.jpg")], ann)  # as each start does, in another order
    assert np.array_equal(mask_of(ann, 1), corrected)
    take_with_masks([str(tmp_path / name) for name in ("a.jpg", "b.jpg", "a.mask.png")], ann)
    assert np.array_equal(mask_of(ann), corrected)


def test_the_brush_adds_to_the_mask_and_takes_away_from_it(ann):
    before, layer = mask_of(ann), PIL.Image.new("RGBA", (EDIT_PX, EDIT_PX), (0, 0, 0, 0))
    layer.paste((*LEFT_OUT, 150), (0, 0, EDIT_PX, EDIT_PX // 2))
    layer.paste((*LEARNED, 150), (EDIT_PX // 2, EDIT_PX // 2, EDIT_PX, EDIT_PX))
    keep(ann, "photo_01.png", layer)
    middle = len(before) // 2
    assert not mask_of(ann)[: middle - 1].any() and mask_of(ann)[middle + 1 :].all() and before[:middle].any()


def test_the_old_mask_comes_back(ann):
    given = mask_of(ann)
    for box in ((8, 8, 60, 90), (20, 20, 40, 40)):
        keep(ann, "photo_01.png", painted(ann, box))
    put_back(ann, "photo_01.png")
    put_back(ann, "photo_01.png")
    assert np.array_equal(mask_of(ann), given)
    keep(ann, "photo_02.png", painted(ann, (8, 8, 60, 90)))
    put_back(ann, "photo_02.png")
    assert not (ann.photos_dir / "photo_02.mask.png").exists()


def test_what_looks_wrong_is_said_and_nothing_is_kept_of_an_empty_one(ann, monkeypatch):
    with pytest.raises(UserError, match="the mask is empty"):
        keep(ann, "photo_01.png", painted(ann))
    assert "nearly the whole picture" in keep(ann, "photo_01.png", painted(ann, WHOLE))
    dots = painted(ann, *((left, 8, left + 16, 40) for left in range(0, 128, 32)))
    assert "in 4 pieces" in keep(ann, "photo_01.png", dots)
    assert "in 4 pieces" in next(shown_masks(config_of(ann), ann)).remark
    for name in ("photo_09.png", "../photo_01.png", ""):
        with pytest.raises(UserError, match="not there any more"):
            keep(ann, name, dots)
    monkeypatch.setattr(mask_corrections, "MOST_KEPT", 1)
    keep(ann, "photo_02.png", painted(ann, (8, 8, 60, 90)))
    assert len(list((ann.root / "corrected_masks").iterdir())) == 1


def png(size: tuple[int, int], alpha: int = 200) -> bytes:
    PIL.Image.new("RGBA", size, (0, 0, 0, alpha)).save(buffer := io.BytesIO(), format="PNG")
    return buffer.getvalue()


def test_what_a_page_paints_is_bounded_before_it_is_read(monkeypatch):
    editor = mask_editor.mask_editor()

    def send(name: str, content: bytes, kind: str = "layer", index: object = "0") -> None:
        editor.accept_blobs(SimpleNamespace(data={"type": kind, "index": index, "id": name}, files=[("file", content)]))

    def value_of(name: str) -> PIL.Image.Image | None:
        return editor.preprocess(SimpleNamespace(id=name))

    send("mine", png((30, 20)))
    send("mine", png((3000, 3000)), "background")
    assert value_of("mine").size == (30, 20) and value_of("mine") is None
    for index in ("1", "1000000000", "x"):
        with pytest.raises(fastapi.HTTPException):
            send("mine", b"x", index=index)
    for content in (png((3000, 3000)), b"no picture"):
        send("mine", content)
        with pytest.raises(gr.Error, match="no picture of the size"):
            value_of("mine")
    monkeypatch.setattr(mask_editor, "KEPT_BYTES", 100)
    for name in ("first", "second"):
        send(name, b"x" * 60)
    assert list(editor.blob_storage) == ["second"]


@pytest.mark.parametrize(
    ("widget", "event"), [("photos", "upload"), ("photos_2", "clear"), ("remove_subject", "click"), ("reopen", "click")]
)
def test_what_replaces_the_photos_hides_the_masks_and_the_brush_of_the_old_ones(served, widget, event):
    page = served.page
    numbers = {block.elem_id: number for number, block in page.blocks.items()}
    of_event = [fn for fn in page.fns.values() if (numbers[widget], event) in fn.targets]
    (hide,) = [fn for fn in of_event if numbers["mask_box"] in [block._id for block in fn.outputs]]
    shown = dict(zip((block.elem_id for block in hide.outputs), hide.fn()))
    assert [shown[name].visible for name in ("mask_remarks", "masks", "mask_box")] == [False] * 3
