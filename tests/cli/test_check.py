"""`python -m dreambooth_moslora check`: each file has a line; the picture, and the exit codes."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.photos.captions import Captioner
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.quality import CELL_PX, build_crop_rows
from dreambooth_moslora.settings.family_facts import SDXL_HUB_ID
from dreambooth_moslora.settings.train_config import TrainConfig
from tests.helpers.odd_photos import CASES, make_folder, picture
from tests.helpers.tiny_training import paint_photos

ROOT = Path(__file__).resolve().parents[2]
TOY = ["--pretrained_model_name_or_path", "toy"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_check_lists_every_file(tmp_path, capsys):
    folder = make_folder(tmp_path / "photos")
    assert main(["check", str(folder), "dog", "--no_picture", "--resolution", "64"]) == 0
    out = capsys.readouterr().out
    marks = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    usable = sum(case.usable for case in CASES)
    assert marks.count("ok") + marks.count("bad") == usable and f"{usable} usable, " in out
    assert "turned_6.jpg  128 x 96  rotated by EXIF" in out
    assert "left  text.jpg  broken: not a picture, or damaged" in out
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no")
    assert main(["check", "bad", "dog"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no usable photo") and error.count("\n") == 1


def test_check_judges_photos_as_train_would(tmp_path, capsys):
    """For the toy base where there is no GPU, and its size. A blurred copy is the duplicate, though
    it is first."""
    for name in ("00.jpg", "01.jpg"):
        shutil.copy(ROOT / "assets" / "subjects" / "rocket" / name, tmp_path / name)
    with Image.open("00.jpg") as sharp:
        sharp.filter(ImageFilter.GaussianBlur(8)).save("00 copy.jpg")
        sharp.resize((40, 40)).save("tiny.jpg")
    assert main(["check", ".", "rocket", "--no_picture"]) == 0
    captured = capsys.readouterr()
    assert (
        "the embedded one, as there is no GPU here" in captured.err
        and "“a photo of a sks rocket”" in captured.out
    )
    assert "40 x 40 px is enlarged 3.2 times" in captured.out, "to 128 px"
    few = "only 2 of 4 photos are without a fault: better ones help; training takes all"
    judged = f"for toy at 128 px; for SDXL add --base {SDXL_HUB_ID}"
    assert captured.out.splitlines()[-1] == f"verdict: {few} ({judged})"
    marks = [
        line.split()[0]
        for line in captured.out.splitlines()
        if line.startswith("  ") and ".jpg" in line
    ]
    assert marks == ["bad", "ok", "ok", "bad"]
    assert main(["check", ".", "rocket", "--no_picture", "--resolution", "800"]) == 0
    output = capsys.readouterr().out.splitlines()[-1]
    assert output.startswith("verdict: only 0 of 3 photos are without a fault: better ones help")
    assert "at 800 px" in output
    shutil.copy(ROOT / "assets" / "subjects" / "rocket" / "02.jpg", tmp_path / "02.jpg")
    assert main(["check", ".", "rocket", "--no_picture"]) == 0
    output = capsys.readouterr().out
    bad = "leave out 00 copy.jpg, tiny.jpg (--leave_out '00 copy.jpg' tiny.jpg); "
    enough = f"verdict: {bad}3 good photos are there, enough to train ({judged})\n"
    assert output.endswith(enough)
    (tmp_path / "tiny.jpg").rename("$(reboot).jpg")
    assert main(["check", ".", "rocket", "--no_picture"]) == 0
    assert "(--leave_out '$(reboot).jpg' '00 copy.jpg')" in capsys.readouterr().out, (
        "a shell runs none"
    )


def test_a_photo_that_is_enlarged_a_little_is_good_and_says_so(tmp_path, capsys):
    """Ordinary photos of 780 px were all bad for SDXL, and none was good."""
    for seed in range(3):
        tiles = np.random.default_rng(seed).integers(40, 255, (6, 6, 3), np.uint8)
        photo = Image.fromarray(tiles).resize((512, 512), Image.Resampling.NEAREST)
        photo.save(f"{seed}.png")
    assert main(["check", ".", "rocket", "--no_picture", "--resolution", "720"]) == 0
    out = capsys.readouterr().out
    assert "  ok    0.png" in out and "a little small: " in out and "enlarged 1.4 times" in out
    assert "bad" not in out and "3 good photos are there, enough to train" in out


def test_equal_crops_of_a_square_photo_are_one_cell(tmp_path):
    """Four equal crops stood beside each photo."""
    picture(size_px=(96, 96)).save("a.png")
    picture(size_px=(96, 160)).save("b.png")
    photos = find_photos(tmp_path, "a photo of a sks dog", 64).photos
    config = TrainConfig(
        pretrained_model_name_or_path="toy",
        instance_prompt="a photo of a sks dog",
        resolution=64,
        crops_per_photo=4,
    )
    square, long = build_crop_rows(photos, config)
    assert square.title == "a.png; all 4 crops are the same" and len(square.images) == 2
    assert long.title == "b.png" and len(long.images) == 5


def test_crops_of_large_photos_are_stored_small(tmp_path):
    """Thirty photos for 1024 px took 0.7 GB."""
    picture(size_px=(700, 900)).save("a.png")
    photos = find_photos(tmp_path, "a photo of a sks dog", 64).photos
    config = TrainConfig(instance_prompt="a photo of a sks dog", resolution=640)
    (row,) = build_crop_rows(photos, config)
    assert {max(image.size) for image in row.images} == {CELL_PX}


def test_crop_sheet_shows_all_photos_outside_their_folder(tmp_path, capsys, monkeypatch):
    """There it would be one of them in the next check and in the training."""
    (tmp_path / "dog").mkdir()
    picture().save("dog/a.png")
    flags = ["--resolution", "64", "--crops-per-photo", "3"]
    assert main(["check", "dog", "dog", *flags]) == 0
    out = capsys.readouterr().out
    assert "a.png  128 x 96" in out and "the crops: dog_crops.png" in out
    with Image.open("dog_crops.png") as sheet:
        colours = {sheet.getpixel((x, sheet.height // 2)) for x in range(sheet.width)}
    assert len(colours) > 4
    os.unlink("dog_crops.png")
    monkeypatch.chdir("dog")
    assert main(["check", ".", "dog", *flags]) == 0
    assert f"the crops: {tmp_path / 'dog_crops.png'}" in capsys.readouterr().out
    assert os.listdir() == ["a.png"] and (tmp_path / "dog_crops.png").is_file()


def test_crop_shapes_follow_flags_and_recipe(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    picture(size_px=(160, 90)).save("photos/a.png")
    Path("square.toml").write_text("enable_bucket = false")
    Path("coarse.toml").write_text("enable_bucket = true\nbucket_reso_steps = 32")

    def crops(*flags: str) -> tuple[bytes, bool]:
        assert main(["check", "photos", "dog", "--resolution", "64", *flags]) == 0
        is_said = "crops: in the photos' own shapes (--no_enable_bucket)" in capsys.readouterr().err
        return Path("photos_crops.png").read_bytes(), is_said

    bucketed, square = crops("--enable_bucket"), crops("--no_enable_bucket")
    assert bucketed != square and crops() == (bucketed[0], True)
    coarse = crops("--config", "coarse.toml")
    square = crops("--config", "square.toml")
    assert coarse != square == crops("--config", "coarse.toml", "--no_enable_bucket")
    Path("large.toml").write_text("resolution = 2048\nrank = 8")
    assert main(["check", "photos", "dog", "--config", "large.toml", "--no_picture"]) == 2
    Path("wrong.toml").write_text("reslution = 64")
    assert main(["check", "photos", "dog", "--config", "wrong.toml", "--no_picture"]) == 2
    assert "unknown setting `reslution`: did you mean `resolution`?" in capsys.readouterr().err
    flags = ["--config", "large.toml", "--resolution", "64", "--no_picture"]
    assert main(["check", "photos", "dog", *flags]) == 0


@pytest.mark.parametrize(
    ("base", "step", "other_step"), [("toy", "8", "16"), ("toy-zimage", "16", "8")]
)
def test_crops_have_sides_that_the_bases_patches_divide(base, step, other_step, tmp_path):
    """As training's."""
    (tmp_path / "dog").mkdir()
    picture(size_px=(160, 90)).save("dog/a.png")

    def crops(*flags: str) -> bytes:
        base_of = [
            "--pretrained_model_name_or_path",
            base,
            "--resolution",
            "128",
            "--enable_bucket",
        ]
        assert main(["check", "dog", "dog", *base_of, *flags]) == 0
        return Path("dog_crops.png").read_bytes()

    assert crops() == crops("--bucket_reso_steps", step) != crops("--bucket_reso_steps", other_step)


@pytest.mark.slow
def test_a_name_that_is_no_text_is_spelled_out(tmp_path):
    """In the report, in the error line, and on a terminal that knows less than UTF-8."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"}
    command = [
        sys.executable,
        "-m",
        "dreambooth_moslora",
        "check",
        ".",
        "dog",
        "--no_picture",
        "--resolution",
        "64",
    ]
    check = lambda: subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)  # noqa: E731
    Path(os.fsdecode(bytes(tmp_path) + b"/broken\xff.png")).write_bytes(b"no picture")
    done = check()
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert rb"broken\udcff.png (broken: not a picture" in done.stderr
    picture().save(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png"))
    (tmp_path / "雪.txt").touch()
    done = check()
    assert (
        done.returncode == 0
        and rb"ok    caf\udce9.png" in done.stdout
        and rb"left  \u96ea.txt" in done.stdout
    )


@pytest.mark.slow
def test_photo_names_are_printed_without_control_characters(tmp_path, tiny_base, capfd):
    hostile = "a\x1b[31m\x9b31m\r\x7f"
    picture().save(tmp_path / f"{hostile}.jpg")
    (tmp_path / f"{hostile}.txt").write_text(hostile)
    (tmp_path / f"{hostile}.md").touch()
    picture().save(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png"))
    Path(os.fsdecode(bytes(tmp_path) + b"/broken\xff.png")).write_bytes(b"no picture")
    small = ["--resolution", "64"]
    train = [
        "--pretrained_model_name_or_path",
        tiny_base,
        "--instance_data_dir",
        tmp_path,
        *small,
        "--rank",
        "1",
    ]
    train += [
        "--instance_prompt",
        "a sks dog",
        "--output_dir",
        tmp_path / "run",
        "--report_to",
        "none",
    ]
    train += ["--max_train_steps", "1", "--num_validation_images", "0"]
    for arguments in (
        ["check", tmp_path, "dog", "--no_picture", *small],
        ["train", *train, "--dry_run"],
        ["train", *train],
    ):
        assert main(list(map(str, arguments))) == 0
        output = "".join(capfd.readouterr())
        assert "a\\x1b[31m\\x9b31m\\x0d\\x7f" in output
        assert "[31m" not in output.replace("\\x1b[31m", "") and not {"\x7f", "\x9b"} & set(output)
        assert r"broken\udcff.png" in output
    log = (tmp_path / "run" / "train.log").read_text()
    assert (
        r"broken\udcff.png is left out" in log and "begins: version" in log and "ended: done" in log
    )


def copy_duck_photos(folder: Path, *names: str) -> Path:
    (folder / "duck").mkdir()
    for name in names:
        shutil.copy(ROOT / "assets" / "subjects" / "duck" / name, folder / "duck" / name)
    return folder / "duck"


def test_masks_of_toy_photos_are_made_and_darken_crops(tmp_path, capsys):
    duck = copy_duck_photos(tmp_path, "00.jpg", "01.jpg", "01.mask.png")
    user_mask = (duck / "01.mask.png").read_bytes()
    command = ["check", "duck", "duck", "--make_masks", *TOY]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert (
        "00.jpg  00.mask.png is written\n" in captured.err
        and "01.jpg  it has a mask, which is kept" in captured.err
    )
    assert captured.out.count("has a mask") == 2
    assert (duck / "01.mask.png").read_bytes() == user_mask
    new_mask = (duck / "00.mask.png").read_bytes()
    assert main(command) == 0 and (duck / "00.mask.png").read_bytes() == new_mask


def test_captions_name_the_place_behind_the_subject(tmp_path, capsys):
    duck = copy_duck_photos(tmp_path, "01.jpg", "03.jpg", "03.txt")
    user_caption = (duck / "03.txt").read_bytes()
    assert main(["caption", "duck", "--subject", "sks duck", *TOY]) == 0
    assert (duck / "01.txt").read_text() == "a photo of a sks duck on a wooden floor\n"
    assert (duck / "03.txt").read_bytes() == user_caption
    out = capsys.readouterr().out
    assert "03.jpg  it has a caption, which is kept" in out and out.endswith(
        "2 photos, 1 captions written\n"
    )
    (duck / "01.txt").unlink()
    assert main(["caption", "duck", "--subject", "ohwx duck", *TOY]) == 0
    assert (duck / "01.txt").read_text() == "a photo of a ohwx duck on a wooden floor\n"
    assert main(["check", "duck", "duck", "--no_picture", *TOY]) == 0
    assert "“a photo of a ohwx duck on a wooden floor”" in capsys.readouterr().out


def test_captions_say_the_looks_that_are_asked_for(tmp_path, monkeypatch, capsys):
    """The help of `caption` spoke of a person's other looks, which it is never told of."""
    described_looks = []
    monkeypatch.setattr(
        "dreambooth_moslora.photos.captions.load_captioner",
        lambda config, device: (
            described_looks.append(config.describe) or Captioner("x", "y", lambda _: "z")
        ),
    )
    copy_duck_photos(tmp_path, "01.jpg")
    for looks in ([], ["--describe", "hair", "clothes"]):
        assert main(["caption", "duck", "--subject", "sks duck", *TOY, *looks]) == 0
    assert described_looks == [(), ("hair", "clothes")]
    with pytest.raises(SystemExit):
        main(["caption", "--help"])
    assert "of a person" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command_line", "says"),
    [
        ("check x dog --resolution 7", "--resolution 7"),
        ("check x dog --config missing.toml", "--config missing.toml"),
        (
            "check . dog --base toy --make_masks --mask_model /nowhere",
            "--mask_model /nowhere is not here",
        ),
        ("caption .", "required: --subject"),
        ("caption . --subject sks", "no word says what the photos show"),
        ("caption . --subject 'sks duck'", "--caption_model Qwen/Qwen3-VL-2B-Instruct is not here"),
        (
            "caption . --subject 'sks duck' --caption_model /nowhere",
            "--caption_model /nowhere is not here",
        ),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(command_line, says, tmp_path, capsys):
    picture(size_px=(1100, 1100)).save("a.png")
    assert main(shlex.split(command_line)) == 2
    error = capsys.readouterr().err
    assert says in error.splitlines()[-1] and os.listdir() == ["a.png"]


def test_a_shared_prompt_stands_once_without_a_training_plan(tmp_path, monkeypatch, capsys):
    """The same prompt stood under every photo, below the steps and the recipe of a training."""
    monkeypatch.chdir(tmp_path)
    for path in paint_photos(tmp_path / "dog", 4).iterdir():
        Image.open(path).resize((256, 256)).save(path)
    assert main(["check", "dog", "dog", "--base", "toy", "--no_picture"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("“a photo of a sks dog”") == 1
    assert "steps: " not in captured.err and "recipe: " not in captured.err
