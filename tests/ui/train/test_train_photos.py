"""Photos on the page: how they are taken, their crops, and masks that are shown with them."""

import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest

from dreambooth_moslora.disk.contents import hash_file
from dreambooth_moslora.disk.paths import get_assets_folder
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos.augment import CropRule, apply_crop
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.photo_file import open_rgb
from dreambooth_moslora.photos.quality import plan_crops
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.ui.jobs import Jobs
from dreambooth_moslora.ui.page import build_app
from dreambooth_moslora.ui.photo_copies import copy_photos, list_photo_copies
from dreambooth_moslora.ui.train import train_form
from dreambooth_moslora.ui.train.mask_pictures import collect_masks
from dreambooth_moslora.ui.train.train_form import TrainForm
from dreambooth_moslora.ui.train.train_photos import (
    add_photos,
    build_cards,
    build_review,
    remove_photo,
    write_captions,
)
from tests.ui.conftest import write_run

HALF = "a \ud800"
"""JSON can hold a lone surrogate."""
TOYS = get_assets_folder() / "subjects" / "rocket"
ROCKET = TrainForm("sks", "rocket")


def build_config(workspace, form: TrainForm = ROCKET, base: str = "toy", **values) -> TrainConfig:
    form = replace(form, **values)
    return TrainConfig.from_dict(
        form.choose_settings(base, 128, workspace.photos_dir, workspace.root / "run").all_settings
    )


def to_array(picture: PIL.Image.Image) -> np.ndarray:
    return np.asarray(picture)


def test_photos_are_numbered_and_faults_reported(tmp_path, workspace):
    def noise(seed: int, side: int = 160) -> PIL.Image.Image:
        to_array = np.random.default_rng(seed).integers(0, 255, (side, side + 8, 3), dtype=np.uint8)
        return PIL.Image.fromarray(to_array)

    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "letter.jpg").write_text("hello")
    noise(1).save(tmp_path / "turned.png", exif=turned)
    noise(2).save(tmp_path / "good.png")
    noise(2).point(lambda value: value * 9 // 10).save(tmp_path / "twin.png")
    noise(3).filter(PIL.ImageFilter.GaussianBlur(4)).save(tmp_path / "soft.png")
    noise(4, 20).save(tmp_path / "tiny.png")
    names = ("letter.jpg", "turned.png", "good.png", "twin.png", "soft.png", "tiny.png")
    ctx = SimpleNamespace(
        resolution_px=64, base_name="some/base", workspace=workspace, jobs=Jobs(tmp_path)
    )
    files = [str(tmp_path / name) for name in names]
    review = build_review(ctx, ROCKET, copy_photos(files, workspace.photos_dir))
    assert [p.name for p in sorted(workspace.photos_dir.iterdir())] == [
        f"photo_0{n}.png" for n in range(1, 6)
    ]
    faults = (
        "letter.jpg: broken",
        "photo 3: near-duplicate of photo_02",
        "photo 4: blurred",
    )
    for remark in (*faults, "photo 5: too small", "only 2 of 5 photos are"):
        assert remark in review.remarks, (remark, review.remarks)
    assert [caption == "good" for _, caption in review.crops] == [True, True, False, False, False]
    assert "5 photos will be used" in review.remarks  # of six files


def test_length_and_measured_time_stand_before_the_start(toys, tab):
    """The time is that of a run with the same settings; without one none is told."""
    assert (
        "5 photos will be used, cropped as shown: 480 steps." in build_review(tab, ROCKET).remarks
    )
    start = {"type": "start", "time": 100.0, "config": build_config(toys).to_dict()}
    steps = [{"type": "step", "time": 110.0 + 2 * step, "step": step} for step in range(3)]
    write_run(tab.jobs.runs_dir / "duck", start, *steps)
    assert "240 steps, about 8 min 10 s at the pace of the run duck." in (
        build_review(tab, replace(ROCKET, preset="quick")).remarks
    )
    assert "about" not in build_review(tab, replace(ROCKET, batch_size=2)).remarks


def write_noise_files(folder, *seeds: int) -> list[str]:
    """Files of noise, whose names are their seeds."""
    files = [folder / f"{seed}.png" for seed in seeds]
    for seed, file in zip(seeds, files):
        PIL.Image.fromarray(
            np.random.default_rng(seed).integers(0, 255, (90, 80, 3), dtype=np.uint8)
        ).save(file)
    return list(map(str, files))


def list_colours(workspace) -> list[int]:
    return [
        open_rgb(photo).getpixel((0, 0))
        for photo in find_photos(workspace.photos_dir, "", 64).photos
    ]


def test_photos_are_added_deduplicated_and_removed(tmp_path, workspace):
    first, second, third = write_noise_files(tmp_path, 1, 2, 3)
    PIL.Image.new("L", (80, 90), 255).save(tmp_path / "3.mask.png")
    (broken := tmp_path / "4.png").write_text("hello")
    assert add_photos([first, second], workspace) == []
    (remark,) = add_photos([third, str(tmp_path / "3.mask.png"), first, str(broken)], workspace)
    assert remark.startswith("4.png: broken")
    before = list_colours(workspace)
    with pytest.raises(UserError, match="none of the files is a usable photo"):
        add_photos([str(broken)], workspace)
    with pytest.raises(UserError, match="51 photos are too many"):
        add_photos([third] * 48, workspace)
    names = ["photo_01.png", "photo_02.png", "photo_03.mask.png", "photo_03.png"]
    assert (
        sorted(file.name for file in workspace.photos_dir.iterdir()) == names
        and len(set(before)) == 3
    )
    remove_photo(workspace, "0" * 64)
    remove_photo(workspace, hash_file(workspace.photos_dir / "photo_02.png"))
    assert (
        list_colours(workspace) == [before[0], before[2]]
        and (workspace.photos_dir / "photo_02.mask.png").is_file()
    )


def test_caption_follows_its_photo(tmp_path, workspace, tab):
    PIL.Image.new("RGB", (9, 9), "red").save(tmp_path / "tiny.png")
    add_photos([str(tmp_path / "tiny.png"), *write_noise_files(tmp_path, 1, 2)], workspace)
    tiny, first, second = map(hash_file, list_photo_copies(workspace.photos_dir))
    write_captions(
        workspace, [["../../x", "a"], ["", "a"], [first, " on a \n beach"], [second, HALF]]
    )
    # A photo that is not used has a row, too.
    review = build_review(tab, ROCKET)
    used = [remark.partition(":")[0] for _, remark in review.crops]
    assert used[:2] == ["not used", "too small for the resolution"]
    assert "2 of 3 photos will be used" in review.remarks
    remove_photo(workspace, tiny)
    captions = [(card["photo"], card["caption"]) for card in build_cards(build_review(tab, ROCKET))]
    assert captions == [(first, "on a beach"), (second, "a ?")]
    write_captions(workspace, [[first, ""]])
    texts = [file.relative_to(workspace.photos_dir) for file in tmp_path.rglob("*.txt")]
    assert list(map(str, texts)) == ["photo_02.txt"]


def test_dropped_captions_go_to_their_photos(tmp_path, workspace):
    """A later drop of an equal photo brings its caption and mask to the first."""
    first, second = write_noise_files(tmp_path, 1, 2)
    assert add_photos([first], workspace) == []
    (tmp_path / "1.txt").write_text("a duck\non a beach", encoding="utf-16")
    (tmp_path / "2.txt").write_text("a duck at night")
    (tmp_path / "9.txt").write_text("a duck in the rain")
    PIL.Image.new("L", (80, 90), 255).save(tmp_path / "1.mask.png")
    sidecars = [str(tmp_path / name) for name in ("1.txt", "2.txt", "9.txt", "1.mask.png")]
    remarks = add_photos([first, second, *sidecars], workspace)
    assert remarks == ["9.txt: no photo of this name was dropped with it"]
    captions = [photo.captions for photo in find_photos(workspace.photos_dir, "", 64).photos]
    assert captions == [("a duck", "on a beach"), ("a duck at night",)]
    assert (workspace.photos_dir / "photo_01.mask.png").is_file()
    # The page sends them back in one line: they stay two captions until they are edited.
    digest = hash_file(workspace.photos_dir / "photo_01.png")
    for text, lines in (("a duck on a beach", 2), ("a duck on a lake", 1)):
        write_captions(workspace, [[digest, text]])
        assert len((workspace.photos_dir / "photo_01.txt").read_text().splitlines()) == lines
    with pytest.raises(UserError, match="together with their photos"):
        add_photos(sidecars[:1], workspace)


@pytest.mark.parametrize("base, seed", [("toy", 0), ("toy", 7), ("some/base", 7)])
def test_shown_crops_equal_the_runs(tmp_path, workspace, base, seed):
    x, y = np.meshgrid(np.arange(400) % 256, np.arange(200))
    PIL.Image.fromarray(np.stack([x, y, x], 2).astype(np.uint8)).save(tmp_path / "wide.png")
    ctx = SimpleNamespace(
        resolution_px=128, base_name=base, workspace=workspace, jobs=Jobs(tmp_path)
    )
    copy_photos([str(tmp_path / "wide.png")], workspace.photos_dir)
    review = build_review(ctx, TrainForm(seed=seed))
    (photo,) = find_photos(workspace.photos_dir, "", 128).photos
    plans = (
        next(plan_crops(photo, 0, build_config(workspace, base=base, seed=seed))),
        CropRule(128, center_crop=True),
    )
    crops = [
        apply_crop(open_rgb(photo), plan)
        for plan in (plans[0], plans[1].plan_crop(photo.size_px, random.Random(0)))
    ]
    assert [np.array_equal(to_array(review.crops[0][0]), to_array(crop)) for crop in crops] == [
        True,
        False,
    ]


def test_fields_that_move_crops_update_the_grid(context, monkeypatch):
    """Another number moves them too, if its row says so."""
    rows = train_form.list_form_fields()
    rows["rank"] = replace(rows["rank"], updates_photos=True)
    monkeypatch.setattr(train_form, "list_form_fields", lambda: rows)
    page = build_app(context())
    again = next(event for event in page.fns.values() if event.name == "update_review")
    labels = {number: getattr(block, "label", None) for number, block in page.blocks.items()}
    targets = {(labels.get(number), trigger) for number, trigger in again.targets}
    numbers = {(name, "blur") for name in ("Seed", "Rank", "Steps", "Batch size", "Resolution")}
    assert targets - {(None, "load")} == numbers | {("Subject", "input"), ("Length", "input")}


@pytest.fixture
def masked_photos(tmp_path, workspace):
    """Two toy photos, the first of which has a mask of its own."""
    files = [tmp_path / name for name in ("a.jpg", "b.jpg", "a.mask.png")]
    for number, file in enumerate(files[:2]):
        shutil.copy(TOYS / f"0{number}.jpg", file)
    with PIL.Image.open(files[0]) as photo:
        left_half = PIL.Image.new("L", photo.size, 0)
        left_half.paste(255, (0, 0, photo.width // 2, photo.height))
    left_half.save(files[2])
    copy_photos([str(path) for path in files], workspace.photos_dir)
    return workspace


def test_shown_masks_equal_the_runs(masked_photos, tab):
    given_mask, generated_mask = collect_masks(build_config(masked_photos), masked_photos)
    assert (given_mask.photo.path.name, given_mask.remark, generated_mask.remark) == (
        "photo_01.png",
        "",
        "",
    )
    # the run makes it, as it was shown
    assert not (masked_photos.photos_dir / "photo_02.mask.png").exists()
    (of_given, _), (bare, _) = build_review(tab, ROCKET).crops
    masks = {mask.photo.path: mask.path for mask in (given_mask, generated_mask)}
    (same, _), (lined, _) = build_review(tab, ROCKET, masks=masks).crops
    assert np.array_equal(to_array(of_given), to_array(same))
    # A line around the subject, and nothing else, is of another colour.
    changed = np.abs(to_array(lined).astype(int) - to_array(bare)).max(axis=2) > 60
    assert 0.005 < changed.mean() < 0.15
    bare = collect_masks(build_config(masked_photos, make_masks=False), masked_photos)
    assert [mask.remark for mask in bare] == ["", "no mask: all of it is learned"]
