"""Taking in visitors' photos costs bounded memory, however large they are and however many come at once."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import PIL.Image
import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.masks import open_mask
from dreambooth_moslora.ui.visitors import MAX_SIDE_PX, ONE_AT_A_TIME, kept_photos, take_photos

STATUS = Path("/proc/self/status")
PEAK_CODE = """
import sys
from pathlib import Path
from dreambooth_moslora.photos.photo import open_image
from dreambooth_moslora.ui.visitors import take_photos

def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

before = peak()
take_photos([sys.argv[1]], Path(sys.argv[2]))
print((peak() - before) // 1024)
"""


def deep_png(path: Path) -> None:
    PIL.Image.fromarray(np.full((5000, 5000), 40_000, dtype=np.uint16)).save(path, compress_level=1)


def large_jpeg(path: Path) -> None:
    PIL.Image.new("L", (2 * MAX_SIDE_PX, 2 * MAX_SIDE_PX), 128).save(path)


@pytest.mark.skipif(not STATUS.exists(), reason="only Linux tells a process's peak")
@pytest.mark.parametrize("write, name", [(deep_png, "deep.png"), (large_jpeg, "large.jpg")])
def test_a_large_photo_takes_little_more_than_its_own_pixels(tmp_path, write, name):
    write(tmp_path / name)
    command = [sys.executable, "-c", PEAK_CODE, str(tmp_path / name), str(tmp_path / "photos")]
    mebibytes = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert mebibytes < 300
    with PIL.Image.open(tmp_path / "photos" / "photo_01.png") as taken:
        assert taken.size == (MAX_SIDE_PX, MAX_SIDE_PX)


def test_a_large_rotated_picture_with_a_palette_stands_upright_and_keeps_its_colours(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    picture = PIL.Image.new("RGB", (MAX_SIDE_PX + 400, 90), "red")
    picture.paste("blue", (0, 0, 400, 90))
    picture.quantize(4).save(tmp_path / "a.png", exif=exif)
    remarks = take_photos([str(tmp_path / "a.png")], tmp_path / "photos")
    assert remarks == ["photo 1: rotated by EXIF, turned upright"]
    with PIL.Image.open(tmp_path / "photos" / "photo_01.png") as taken:
        assert taken.size[1] == MAX_SIDE_PX > taken.size[0]
        assert (taken.getpixel((9, 9)), taken.getpixel((9, 4000))) == ((0, 0, 255), (255, 0, 0))


def test_masks_go_with_their_photos_and_are_no_photos(tmp_path):
    for name, colour in (("a.jpg", "red"), ("b.png", "blue")):
        PIL.Image.new("RGB", (96, 64), colour).save(tmp_path / name)
    for name in ("b.Mask.PNG", "c.mask.png"):
        PIL.Image.linear_gradient("L").resize((96, 64)).save(tmp_path / name)
    (tmp_path / "a.mask.png").write_bytes(b"no picture")
    remarks = take_photos([str(path) for path in sorted(tmp_path.iterdir())], tmp_path / "photos")
    assert [path.name for path in kept_photos(tmp_path / "photos")] == ["photo_01.png", "photo_02.png"]
    assert "c.mask.png: a mask of no photo that is here" in remarks
    assert any(remark.startswith("a.mask.png: ") for remark in remarks) and len(remarks) == 2
    first, second = find_photos(tmp_path / "photos", "x", 64).photos
    assert open_mask(first) is None
    assert np.abs(np.array(open_mask(second)).mean() - 127) < 3
    with pytest.raises(UserError, match="add some photos"):
        take_photos([str(tmp_path / "c.mask.png")], tmp_path / "none")


def test_a_black_shape_on_nothing_is_a_mask_of_any_image_format(tmp_path):
    PIL.Image.new("RGB", (96, 64), "red").save(tmp_path / "a.jpg")
    shape = PIL.Image.new("RGBA", (96, 64), (255, 255, 255, 0))
    shape.paste((0, 0, 0, 255), (0, 0, 48, 64))
    shape.save(tmp_path / "a.mask.webp", lossless=True)
    (tmp_path / "a.txt").write_text("a caption is not taken for the mask")
    files = [str(tmp_path / name) for name in ("a.jpg", "a.mask.webp", "a.txt")]
    remarks = take_photos(files, tmp_path / "photos")
    (photo,) = find_photos(tmp_path / "photos", "x", 64).photos
    mask = open_mask(photo)
    assert len(remarks) == 1 and remarks[0].startswith("a.txt: ")
    assert (mask.getpixel((9, 9)), mask.getpixel((90, 9))) == (255, 0)


def test_photos_are_taken_in_one_at_a_time(tmp_path):
    PIL.Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    second = threading.Thread(target=take_photos, args=([str(tmp_path / "a.png")], tmp_path / "photos"))
    with ONE_AT_A_TIME:
        second.start()
        second.join(0.5)
        assert second.is_alive() and not list(tmp_path.rglob("photo_*.png"))
    second.join(30)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["photo_01.png"]


def test_two_tabs_that_send_photos_at_once_do_not_mix_them(tmp_path):
    for colour in ("red", "blue"):
        PIL.Image.new("RGB", (64, 64), colour).save(tmp_path / f"{colour}.png")
    tabs = (("red", 6), ("blue", 1))
    folder, faults = tmp_path / "photos", []

    def send(colour: str, count: int) -> None:
        try:
            take_photos([str(tmp_path / f"{colour}.png")] * count, folder)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=send, args=tab) for tab in tabs]
    with ONE_AT_A_TIME:
        for thread in threads:
            thread.start()
            thread.join(0.2)
    for thread in threads:
        thread.join(30)
    kept = [PIL.Image.open(path).getpixel((0, 0)) for path in folder.iterdir()]
    assert not faults and kept in ([(255, 0, 0)] * 6, [(0, 0, 255)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blue.png", "photos", "red.png"]


def flat_png(path: Path, side: int) -> str:
    PIL.Image.new("1", (side, side)).save(path)
    return str(path)


def test_photos_of_too_many_pixels_together_are_refused_before_any_is_decoded(tmp_path):
    files = [flat_png(tmp_path / f"{number}.png", 10_000) for number in range(7)]
    started = time.perf_counter()
    with pytest.raises(UserError, match="700 megapixels together"):
        take_photos(files, tmp_path / "photos")
    assert time.perf_counter() - started < 1


@pytest.mark.slow
def test_one_photo_need_not_wait_for_another_visitors_many(tmp_path):
    """They take turns photo by photo."""
    many = [flat_png(tmp_path / f"{number}.png", 5000) for number in range(12)]
    small = flat_png(tmp_path / "small.png", 64)
    slow = threading.Thread(target=take_photos, args=(many, tmp_path / "a" / "photos"))
    slow.start()
    while not list(tmp_path.glob("a/*/photos/photo_*.png")):
        time.sleep(0.01)
    take_photos([small], tmp_path / "b" / "photos")
    assert slow.is_alive()
    slow.join(120)


def test_estimate_and_train_do_not_wait_for_each_other(served):
    fns = {fn.api_name: fn for fn in served.page.fns.values()}
    limits = [fns[name].concurrency_limit for name in ("estimate", "train")]
    assert min(limits) > 1


def test_the_page_says_how_a_mask_goes_along(served):
    assert "name.mask.png" in httpx.get(f"{served.url}config").text
