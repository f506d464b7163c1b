"""Photos of every kind, good and bad: each gets its verdict, none ends the program, and pixels come
out right. Their crops: inside the photo, drawn evenly, equal to resizing first."""

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos import augment, photo_file
from dreambooth_moslora.photos.augment import CropPlan, CropRule, apply_crop
from dreambooth_moslora.photos.folder import build_photo_report, find_photos, log_strays
from dreambooth_moslora.photos.photo_file import open_rgb
from dreambooth_moslora.settings.train_config import TrainConfig
from tests.helpers.odd_photos import CASES, QUADRANTS, SIZE_PX, make_folder, picture
from tests.helpers.tiny_training import paint_photos

PROMPT = "a photo of sks toy"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("odd") / "photos")


@pytest.fixture(scope="module")
def report(folder):
    return find_photos(folder, PROMPT, SIZE_PX[0] - 32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_file_gets_its_verdict(case, report):
    """Check also that usable photos open upright in their colours; greys keep their brightness."""
    assert len({case.name for case in CASES}) == len(CASES) >= 40
    usable = {photo.path.name: photo for photo in report.photos}
    skipped = {item.path.name: item for item in report.skipped}
    assert (case.name in usable) == case.usable
    item = usable[case.name] if case.usable else skipped[case.name]
    reasons = "; ".join(item.reasons) if case.usable else item.reason
    assert item.size_px == case.size_px
    assert case.says in reasons if case.says else not reasons
    if not case.usable:
        return
    image = open_rgb(item)
    height, width = case.size_px
    assert (image.mode, image.height, image.width) == ("RGB", height, width)
    for row, column in QUADRANTS if case.colours else ():
        colour = image.getpixel((width // 4 + column * width // 2, height // 4 + row * height // 2))
        assert np.abs(np.subtract(colour, QUADRANTS[row, column])).max() <= 24, (
            row,
            column,
            colour,
        )
    if case.name == "grey.jpg":
        expected = np.asarray(picture("L").convert("RGB"), dtype=int)
        assert np.abs(np.asarray(image, dtype=int) - expected).mean() < 2


def display_p3_profile() -> bytes:
    """Return a minimal ICC profile with the primaries of Display P3 (D50-adapted) and gamma 2.2."""
    colorants = {
        b"rXYZ": (0.5151, 0.2412, -0.0011),
        b"gXYZ": (0.2920, 0.6922, 0.0419),
        b"bXYZ": (0.1571, 0.0666, 0.7841),
        b"wtpt": (0.9642, 1.0, 0.8249),
    }
    fixed = {
        k: b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(x * 65536) for x in v))
        for k, v in colorants.items()
    }
    gamma = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    tags = fixed | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma)
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    header = struct.pack(
        ">I4sI4s4s4s", start + len(body), b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ "
    )
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + body


def test_a_wide_gamut_photo_is_converted_and_not_reinterpreted(tmp_path):
    Image.new("RGB", (64, 64), (200, 100, 100)).save(
        tmp_path / "a.png", icc_profile=display_p3_profile()
    )
    (photo,) = find_photos(tmp_path, PROMPT, 64).photos
    red, green, blue = open_rgb(photo).getpixel((9, 9))
    assert (red, green, blue) == pytest.approx((214, 96, 97), abs=4)


CAPTION, LONG = "my sks toy", "my sks toy, " * 3000
TOO_LONG = "longer than captions may be, 32 KiB"


def format_row(name: str, text: str, **options) -> str:
    return json.dumps({"file_name": name, "text": text}, **options)


NONE = (PROMPT,)
CAPTIONS = {
    "all places": (
        {"a": "\ufeffmy sks toy \r\n\n my sks toy, on a table \n".encode(), "d": b"\n"},
        [
            format_row("a.jpg", "not this"),
            format_row("b.jpg", "my sks toy in the snow"),
            "{broken",
            "",
        ],
        [(CAPTION, "my sks toy, on a table"), ("my sks toy in the snow",), NONE, NONE],
        {"metadata.jsonl": "line 3 ", "d.txt": "empty"},
    ),
    "too long": (  # ten megabytes of words kept the tokenizer busy for minutes
        {"a": LONG.encode(), "b": b"my sks toy\n" * 2900},
        [],
        [NONE, (CAPTION,), NONE, NONE],
        {"a.txt": f"captions not read: {TOO_LONG}"},
    ),
    "as notepad saves them": (
        {"a": "my sks toy, café".encode("utf-16"), "b": "my sks toy, café".encode("latin-1")},
        [
            format_row("c.jpg", "one\u2028two", ensure_ascii=False) + "\r",
            format_row("d.jpg", "half \ud83d") + "\r",
            "",
        ],
        [("my sks toy, café",), NONE, ("one two",), ("half ?",)],
        {"b.txt": "captions not read: neither UTF-8 nor UTF-16 text"},
    ),
    "other words": (
        {},
        ['{"file_name": "a.jpg", "txt": "x"}'],
        [NONE] * 4,
        {"metadata.jsonl": "line 1 is not"},
    ),
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_come_from_text_file_then_metadata_then_prompt(name, tmp_path):
    texts, metadata, captions, complaints = CAPTIONS[name]
    for name in "abcd":
        picture().save(tmp_path / f"{name}.jpg")
    for name, content in texts.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    (tmp_path / "metadata.jsonl").write_bytes("\n".join(metadata).encode())
    report = find_photos(tmp_path, PROMPT, 64)
    assert [tuple(dict.fromkeys(photo.captions)) for photo in report.photos] == captions
    assert photo_file.format_captions(report.photos[0]) == " or ".join(
        f"“{text}”" for text in captions[0]
    )
    assert [item.path.name for item in report.skipped] == list(complaints)
    assert all(item.reason.startswith(complaints[item.path.name]) for item in report.skipped)


def test_captions_and_masks_with_other_trainers_names_are_read(tmp_path):
    for name in ("a", "b"):
        picture().save(tmp_path / f"{name}.jpg")
        picture().convert("L").save(tmp_path / f"{name}-masklabel.png")
        (tmp_path / f"{name}.caption").write_text(f"caption {name}")
    picture().convert("L").save(tmp_path / "b.mask.png")
    (tmp_path / "b.txt").write_text("text b")
    photos = find_photos(tmp_path, PROMPT, 64).photos
    assert [photo.path.name for photo in photos] == ["a.jpg", "b.jpg"]
    assert [photo.captions for photo in photos] == [("caption a",), ("text b",)]
    assert [photo.mask_path.name for photo in photos] == ["a-masklabel.png", "b.mask.png"]


def test_captions_of_a_jsonl_file_with_paths_are_read(tmp_path):
    """Form of musubi-tuner."""
    picture().save(tmp_path / "a.jpg")
    row = {"image_path": "/elsewhere/a.jpg", "caption": "my sks toy"}
    (tmp_path / "captions.jsonl").write_text(json.dumps(row))
    report = find_photos(tmp_path, PROMPT, 64)
    assert [photo.captions for photo in report.photos] == [("my sks toy",)]
    assert [path.name for path in report.sidecars] == ["captions.jsonl"] and not report.skipped


def test_nothing_usable_is_one_line_that_names_the_files(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match=r"no usable photo in .*broken\.jpg \(broken: not a"):
        build_photo_report(TrainConfig(instance_data_dir=tmp_path))
    for name in ("missing", "broken.jpg"):
        with pytest.raises(UserError, match="folder"):
            find_photos(tmp_path / name, PROMPT, 64)


def test_unused_files_are_logged_in_one_line(tmp_path, caplog):
    picture().save(tmp_path / "1.JPG")
    (tmp_path / "1.TXT").write_text("my sks toy")
    Image.new("L", (128, 96), 255).save(tmp_path / "1.mask.PNG")
    for name in ("b.md", "c.mov", "d.Txt", "e.pdf", ".DS_Store", "subject.json"):
        (tmp_path / name).write_text("x")
    report = build_photo_report(TrainConfig(instance_data_dir=tmp_path, resolution=64))
    (photo,) = report.photos
    assert photo.captions == ("my sks toy",) and photo.mask_path == tmp_path / "1.mask.PNG"
    assert [path.name for path in report.sidecars] == ["1.TXT", "1.mask.PNG"]
    reasons = {item.path.name: item.reason for item in report.skipped}
    assert reasons["d.Txt"] == "stray: belongs to no photo"
    log_strays(report)
    (line,) = caplog.messages
    assert line.startswith("files not used (4): b.md (stray: not a photo)") and line.endswith(
        "1 more."
    )
    assert ".DS_Store" not in line and "subject.json" not in line


@pytest.mark.skipif(
    not Path("/proc/self/mem").is_file(), reason="a file that gives an input/output error"
)
def test_an_input_error_ends_the_run(tmp_path):
    (paint_photos(tmp_path, 2) / "z.png").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        find_photos(tmp_path, PROMPT, 64)


def test_photos_are_left_out_by_name(tmp_path):
    folder = str(paint_photos(tmp_path / "photos"))

    def without(*names):
        return build_photo_report(
            TrainConfig(instance_data_dir=folder, resolution=64, leave_out=names)
        )

    report = without("1.png")
    assert [photo.path.name for photo in report.photos] == ["0.png", "2.png"]
    assert [(item.path.name, item.reason) for item in report.skipped] == [
        ("1.png", "left out by --leave_out")
    ]
    with pytest.raises(UserError, match=r"--leave_out 7\.png: there is no such photo"):
        without("7.png")
    with pytest.raises(UserError, match="--leave_out leaves no photo"):
        without("0.png", "1.png", "2.png")


def paint_smooth(size_px, seed=0):
    height, width = size_px
    small = np.random.default_rng(seed).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def plan_crops(size_px, count: int = 400, seed: int = 0, **options) -> list[CropPlan]:
    return [
        CropRule(32, **options).plan_crop(size_px, random.Random(seed + n)) for n in range(count)
    ]


@pytest.mark.parametrize("size_px", [(64, 64), (100, 333), (333, 100), (65, 64), (5000, 31)])
def test_plans_lie_inside_the_resized_photo_and_reach_both_ends(size_px):
    resized = augment.compute_resized_size(size_px, (32, 32))
    assert min(resized) == 32
    plans = plan_crops(size_px, random_flip=True)
    corners = [plan.crop_top_left for plan in plans]
    assert corners == [plan.crop_top_left for plan in plan_crops(size_px)]
    for side, starts in zip(resized, zip(*corners), strict=True):
        assert (
            min(starts) <= (side - 32) * 0.02 and (side - 32) * 0.98 - 1 <= max(starts) <= side - 32
        )
    assert 100 < sum(plan.is_mirrored for plan in plans) < 300
    assert plan_crops((96, 64), 1, center_crop=True)[0].crop_top_left == (8, 0)


def test_a_zoom_does_not_enlarge_the_photos_pixels():
    plans = plan_crops((128, 128), zoom=1.5)
    sides = [side for plan in plans for side in plan.resized]
    assert min(sides) == 32 and max(sides) == 48 and 38 < sum(sides) / len(sides) < 42
    assert all(0 <= edge <= plan.resized[0] - 32 for plan in plans for edge in plan.crop_top_left)
    assert len({plan.crop_top_left for plan in plans}) > 50, (
        "a square photo gives crops that differ"
    )
    assert all(32 <= plan.resized[0] <= 40 for plan in plan_crops((40, 40), 50, zoom=4))
    assert plan_crops((20, 20), 1, zoom=2)[0].resized == (32, 32)


@pytest.mark.parametrize("by", [Image.Resampling.LANCZOS, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_what_resizing_everything_first_gives(by, flip):
    """Compare all but the edge, where a filter sees more of the photo."""
    photo, plan = paint_smooth((300, 200)), CropPlan((300, 200), (75, 50), (11, 4), (50, 40), flip)
    whole = photo.resize(tuple(reversed(augment.compute_resized_size((300, 200), (50, 50)))), by)
    whole = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else whole
    cuts = [
        np.asarray(image, dtype=int)
        for image in (apply_crop(photo, plan, by), whole.crop((4, 11, 44, 61)))
    ]
    assert np.abs(cuts[0] - cuts[1])[3:-3, 3:-3].max() <= 1


def test_a_mask_of_another_scale_is_cut_at_the_same_place():
    photo, plan = paint_smooth((300, 200)), CropRule(40).plan_crop((300, 200), random.Random(1))
    cuts = [
        np.asarray(apply_crop(image, plan), dtype=int)
        for image in (photo, photo.resize((100, 150)))
    ]
    assert np.abs(cuts[0] - cuts[1]).mean() < 4
