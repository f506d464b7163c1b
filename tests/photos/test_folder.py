"""Photos of every kind, good and bad: each gets its verdict, none ends the program, and pixels come out right."""

import json
import os
import socket
import struct
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, ImageFilter

from dreambooth_moslora.core import UserError
from dreambooth_moslora.photos.crops import MIN_SHARPNESS, examine, sharpness
from dreambooth_moslora.photos.folder import find_photos, log_strays, photo_report
from dreambooth_moslora.photos.photo import open_rgb, quoted
from dreambooth_moslora.settings.table import TrainConfig
from tests.helpers.odd_photos import CASES, QUADRANTS, SIZE_PX, make_folder, picture
from tests.helpers.tiny_training import paint_photos

PROMPT = "a photo of sks toy"
SUBJECTS = sorted((Path(__file__).parents[2] / "assets" / "subjects").iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("odd") / "photos")


@pytest.fixture(scope="module")
def report(folder):
    return find_photos(folder, PROMPT, SIZE_PX[0] - 32)


def quadrant_colours(image):
    height, width = image.height, image.width
    return {
        (row, column): image.getpixel((width // 4 + column * width // 2, height // 4 + row * height // 2))
        for row, column in QUADRANTS
    }


def test_the_corpus_is_large():
    assert len({case.name for case in CASES}) == len(CASES) >= 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_file_gets_its_verdict(case, report):
    usable = {photo.path.name: photo for photo in report.photos}
    left = {item.path.name: item for item in report.skipped}
    assert (case.name in usable) == case.usable
    item = usable[case.name] if case.usable else left[case.name]
    reasons = "; ".join(item.reasons) if case.usable else item.reason
    assert item.size_px == case.size_px
    assert case.says in reasons if case.says else not reasons


@pytest.mark.parametrize("case", [c for c in CASES if c.usable], ids=lambda case: case.name)
def test_every_usable_file_opens_upright_in_its_colours(case, report):
    photo = next(photo for photo in report.photos if photo.path.name == case.name)
    image = open_rgb(photo)
    assert (image.mode, image.height, image.width) == ("RGB", *case.size_px)
    if case.colours:
        for place, colour in quadrant_colours(image).items():
            assert np.abs(np.subtract(colour, QUADRANTS[place])).max() <= 24, (place, colour)


@pytest.mark.parametrize("name", ["deep_grey.png", "deep_grey.tif", "deep_int.tif", "float.tif", "grey.jpg"])
def test_greys_keep_their_brightness_whatever_their_depth(name, report):
    photo = next(photo for photo in report.photos if photo.path.name == name)
    expected = np.asarray(picture("L").convert("RGB"), dtype=int)
    assert np.abs(np.asarray(open_rgb(photo), dtype=int) - expected).mean() < 2


def display_p3_profile() -> bytes:
    """A minimal ICC profile with the primaries of Display P3 (D50-adapted) and gamma 2.2."""
    colorants = {
        b"rXYZ": (0.5151, 0.2412, -0.0011),
        b"gXYZ": (0.2920, 0.6922, 0.0419),
        b"bXYZ": (0.1571, 0.0666, 0.7841),
        b"wtpt": (0.9642, 1.0, 0.8249),
    }
    fixed = {k: b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(x * 65536) for x in v)) for k, v in colorants.items()}
    gamma = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    tags = fixed | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma)
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + body


def test_a_wide_gamut_photo_is_converted_and_not_reinterpreted(tmp_path):
    """As numbers, a colour of Display P3 is less saturated than the same colour in sRGB."""
    Image.new("RGB", (64, 64), (200, 100, 100)).save(tmp_path / "a.png", icc_profile=display_p3_profile())
    (photo,) = find_photos(tmp_path, PROMPT, 64).photos
    red, green, blue = open_rgb(photo).getpixel((9, 9))
    assert (red, green, blue) == pytest.approx((214, 96, 97), abs=4)


def test_captions_come_from_the_text_beside_then_the_metadata_then_the_prompt(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        picture().save(tmp_path / name)
    (tmp_path / "a.txt").write_text("\ufeffmy sks toy \r\n\n my sks toy, on a table \n", encoding="utf-8")
    (tmp_path / "d.txt").write_text("\n")
    rows = [{"file_name": "a.jpg", "text": "not this"}, {"file_name": "b.jpg", "text": "my sks toy in the snow"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    report = find_photos(tmp_path, PROMPT, 64)
    assert [photo.captions for photo in report.photos] == [
        ("my sks toy", "my sks toy, on a table"),
        (rows[1]["text"],),
        (PROMPT,),
        (PROMPT,),
    ]
    assert quoted(report.photos[0]) == "“my sks toy” “my sks toy, on a table”"
    complaints = {(item.path.name, item.reason.split(" ")[0]) for item in report.skipped}
    assert complaints == {("metadata.jsonl", "line"), ("d.txt", "empty")}


def test_a_text_that_is_far_longer_than_captions_is_left_out_and_named(tmp_path):
    """Ten megabytes of words kept the tokenizer busy for minutes."""
    for name in ("a", "b", "c"):
        picture().save(tmp_path / f"{name}.jpg")
    long = "my sks toy, " * 3000
    (tmp_path / "a.txt").write_text(long)
    (tmp_path / "b.txt").write_text("my sks toy\n" * 2900)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "c.jpg", "text": long}))
    report = find_photos(tmp_path, PROMPT, 64)
    assert [set(photo.captions) for photo in report.photos] == [{PROMPT}, {"my sks toy"}, {PROMPT}]
    assert [(item.path.name, item.reason) for item in report.skipped] == [
        ("metadata.jsonl", "line 1 is longer than captions may be, 32 KiB"),
        ("a.txt", "captions not read: longer than captions may be, 32 KiB"),
    ]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"file_name": ' * 100_000], ids=["list", "table"])
def test_a_metadata_line_that_is_nested_too_deeply_is_left_out(line, tmp_path):
    picture().save(tmp_path / "a.jpg")
    rows = [line, json.dumps({"file_name": "a.jpg", "text": "my sks toy"})]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    report = find_photos(tmp_path, PROMPT, 64)
    assert report.photos[0].captions == ("my sks toy",)
    assert [item.reason.split(" is ")[0] for item in report.skipped] == ["line 1"]


def test_captions_are_read_as_notepad_saves_them_and_lines_end_only_at_line_feeds(tmp_path):
    for name in ("a", "b", "c", "d", "e"):
        picture().save(tmp_path / f"{name}.jpg")
    (tmp_path / "a.txt").write_text("my sks toy, café", encoding="utf-16")
    (tmp_path / "b.txt").write_bytes("my sks toy, café".encode("latin-1"))
    rows = [{"file_name": "c.jpg", "text": "one\u2028two"}, {"file_name": "d.jpg", "text": "half \ud83d"}]
    lines = [json.dumps(rows[0], ensure_ascii=False), json.dumps(rows[1]), ""]
    (tmp_path / "metadata.jsonl").write_bytes("\r\n".join(lines).encode())
    report = find_photos(tmp_path, PROMPT, 64)
    captions = [caption for photo in report.photos for caption in photo.captions]
    assert captions == ["my sks toy, café", PROMPT, "one two", "half ?", PROMPT]
    assert [(item.path.name, item.reason.split(";")[0]) for item in report.skipped] == [
        ("b.txt", "captions not read: neither UTF-8 nor UTF-16 text")
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_what_is_no_file_is_neither_photo_nor_caption_nor_mask_and_is_not_waited_for(tmp_path):
    paint_photos(tmp_path, 2)
    for name in ("pipe.png", "0.txt", "1.mask.png", "metadata.jsonl"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "1.txt").mkdir()
    with socket.socket(socket.AF_UNIX) as heard:
        heard.bind(os.path.relpath(tmp_path / "socket.png"))
        report = find_photos(tmp_path, PROMPT, 64)
    assert [photo.path.name for photo in report.photos] == ["0.png", "1.png"] and not report.sidecars
    reasons = {item.path.name: item.reason.removeprefix("stray: ") for item in report.skipped}
    assert reasons.pop("loop.png") == "a link to nothing" and reasons.pop("1.txt").startswith("a folder")
    assert len(reasons) == 6 and set(reasons.values()) == {"not a file"}


def test_suffixes_of_captions_and_masks_may_be_in_capitals(tmp_path):
    picture().save(tmp_path / "1.JPG")
    (tmp_path / "1.TXT").write_text("my sks toy")
    Image.new("L", (128, 96), 255).save(tmp_path / "1.mask.PNG")
    (tmp_path / "2.Txt").write_text("of no photo")
    report = find_photos(tmp_path, PROMPT, 64)
    (photo,) = report.photos
    assert photo.captions == ("my sks toy",) and photo.mask_path == tmp_path / "1.mask.PNG"
    assert [path.name for path in report.sidecars] == ["1.TXT", "1.mask.PNG"]
    assert [(item.path.name, item.reason) for item in report.skipped] == [("2.Txt", "stray: belongs to no photo")]


def test_blurred_and_nearly_equal_photos_are_named_and_others_are_not(tmp_path):
    def scene(seed):
        tiles = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        return Image.fromarray(tiles).resize((300, 300), Image.Resampling.NEAREST)

    first, second = scene(1), scene(2)
    first.save(tmp_path / "a.png")
    first.crop((4, 4, 296, 298)).save(tmp_path / "b.png")
    second.save(tmp_path / "c.png")
    scene(3).filter(ImageFilter.GaussianBlur(5)).save(tmp_path / "d.png")
    verdicts = {p.path.name: "; ".join(p.reasons) for p in examine(find_photos(tmp_path, PROMPT, 64)).photos}
    assert verdicts["a.png"] == verdicts["c.png"] == ""
    assert verdicts["b.png"] == "near-duplicate of a.png"
    assert verdicts["d.png"].startswith("blurred")


def test_nothing_usable_is_one_line_that_names_the_files(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match=r"no usable photo in .*broken\.jpg \(broken: the file is empty\)"):
        photo_report(TrainConfig(instance_data_dir=tmp_path))


def test_files_that_are_not_used_are_said_in_one_line(tmp_path, caplog):
    picture().save(tmp_path / "a.png")
    for name in ("b.md", "c.mov", "d.txt", "e.pdf", ".DS_Store", "subject.json"):
        (tmp_path / name).write_text("x")
    log_strays(photo_report(TrainConfig(instance_data_dir=tmp_path, resolution=64)))
    (line,) = caplog.messages
    assert line.startswith("files not used (4): b.md (stray: not a photo)") and line.endswith("1 more.")
    assert ".DS_Store" not in line and "subject.json" not in line


@pytest.mark.parametrize("name", ["missing", "file.jpg"])
def test_a_folder_that_is_none_is_the_persons_mistake(tmp_path, name):
    picture().save(tmp_path / "file.jpg")
    with pytest.raises(UserError, match="folder"):
        find_photos(tmp_path / name, PROMPT, 64)


def test_a_local_data_set_is_read_with_its_captions(tmp_path):
    source = tmp_path / "data"
    source.mkdir()
    picture().save(source / "one.png")
    picture().rotate(90).save(source / "two.png")
    rows = [{"file_name": "one.png", "words": "first"}, {"file_name": "two.png", "words": "second"}]
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = TrainConfig(dataset_name=source, caption_column="words", cache_dir=tmp_path / "cache", resolution=64)
    photos = photo_report(config).photos
    assert sorted(photo.captions for photo in photos) == [("first",), ("second",)]
    assert {photo.path.read_bytes() for photo in photos} == {(source / n).read_bytes() for n in ("one.png", "two.png")}
    with pytest.raises(UserError, match=r"--caption_column word: .* Did you mean words\?"):
        photo_report(TrainConfig(dataset_name=source, caption_column="word", cache_dir=tmp_path / "cache"))


@pytest.mark.parametrize("named", ["{outside}/secret.png", "../secret.png", "linked.png"])
def test_a_data_set_that_names_a_file_outside_itself_is_refused(named, tmp_path):
    source = tmp_path / "data"
    source.mkdir()
    picture().save(tmp_path / "secret.png")
    (source / "linked.png").symlink_to(tmp_path / "secret.png")
    path = source / named.format(outside=tmp_path)
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(path)}]}, features)
    table.to_parquet(source / "train.parquet")
    with pytest.raises(UserError, match=r"is not a file of the data set"):
        photo_report(TrainConfig(dataset_name=source, cache_dir=tmp_path / "cache"))
    assert not (tmp_path / "cache" / "photos").exists()


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda path: path.name)
def test_a_soft_large_photo_is_sharp_enough_for_a_small_training(subject):
    for path in sorted(subject.glob("*.jpg")):
        image = Image.open(path).convert("RGB")
        assert sharpness(image, 512) < MIN_SHARPNESS < sharpness(image, 128)
        assert sharpness(image.filter(ImageFilter.GaussianBlur(6)), 128) < MIN_SHARPNESS


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="a file that gives an input/output error")
def test_a_photo_that_the_disk_does_not_give_is_not_left_out_but_ends_the_run(tmp_path):
    folder = paint_photos(tmp_path / "photos", 2)
    (folder / "z.png").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        find_photos(folder, "a photo of sks dog", 64)


def test_photos_are_left_out_by_name(tmp_path):
    folder = str(paint_photos(tmp_path / "photos"))
    config = TrainConfig(instance_data_dir=folder, resolution=64, leave_out=("1.png",))
    report = photo_report(config)
    assert [photo.path.name for photo in report.photos] == ["0.png", "2.png"]
    assert [(item.path.name, item.reason) for item in report.skipped] == [("1.png", "left out by --leave_out")]
    with pytest.raises(UserError, match=r"--leave_out 7\.png: there is no such photo"):
        photo_report(TrainConfig(instance_data_dir=folder, resolution=64, leave_out=("7.png",)))
    with pytest.raises(UserError, match="--leave_out leaves no photo"):
        photo_report(TrainConfig(instance_data_dir=folder, resolution=64, leave_out=("0.png", "1.png", "2.png")))
