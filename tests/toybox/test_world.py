"""The toy world draws what its captions say, the same from the same seed, and never what is held
out."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiers import slow_but
from toybox import make_subjects
from toybox.captions import add_article, caption, format_canonical_caption
from toybox.data import render_views
from toybox.data.render_dataset import Shard, write_shard
from toybox.drawing.kinds import SHAPES
from toybox.make_subjects import FOLDER, SUBJECTS, load, sample_individuals, sample_photo_scenes
from toybox.render import render, render_masks
from toybox.world import COLOURS, KINDS, PLACES, Scene, Toy, is_held_out, sample_scene, sample_toy


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng) for _ in range(count)]


def toy_pixels(scene: Scene, size_px: int = 64) -> torch.Tensor:
    """Colours (P, 3) of the pixels that change when the toy changes colour."""
    toy = scene.toys[0]
    other_colour = "white" if toy.colour != "white" else "black"
    pictures = (
        render([scene, replace(scene, toys=(replace(toy, colour=other_colour),))], size_px).float()
        / 255
    )
    changed = (pictures[0] - pictures[1]).abs().amax(-1) > 0.15
    return pictures[0][changed]


@pytest.mark.slow
def test_pictures_depend_on_their_seed_alone():
    three = scenes(3)
    together = render(three, 32)
    assert three == scenes(3) and torch.equal(together, render(scenes(3), 32))
    assert together.shape == (3, 32, 32, 3) and together.dtype == torch.uint8
    for scene, picture in zip(three, together):
        assert (render([scene], 32)[0].int() - picture.int()).abs().max() <= 1


@pytest.mark.slow
def test_masks_hold_the_pixels_that_change_with_the_toy():
    five = [replace(s, light="day") for s in scenes(20) if len(s.toys) == 1][:5]
    black, white = (
        [replace(s, toys=(replace(s.toys[0], colour=c, pattern="plain"),)) for s in five]
        for c in ("black", "white")
    )
    changed = (render(black, 64).int() - render(white, 64).int()).abs().amax(-1) > 40
    masks = render_masks(five, 64)
    around = torch.nn.functional.max_pool2d(masks[:, None].float(), 5, 1, 2)[:, 0] > 0
    assert not (changed & ~around).any()
    assert ((changed & masks).sum((1, 2)) > 0.3 * masks.sum((1, 2))).all()


def heights(some: list[Scene]) -> torch.Tensor:
    """The share of the frame's height that the toys of each scene take, (N,)."""
    return render_masks(some, 32).any(dim=2).float().mean(dim=1)


@pytest.mark.slow
def test_the_usual_view_fills_the_frame_as_subjects_photos_do():
    singles = [scene for scene in scenes(600) if len(scene.toys) == 1]
    usual = [scene for scene in singles if 1.9 <= scene.distance <= 2.6]
    assert len(usual) > 0.85 * len(singles)
    assert min(s.distance for s in usual) < 1.93 and max(s.distance for s in usual) > 2.57
    photos = heights([scene for name in SUBJECTS for scene in sample_photo_scenes(load(name))])
    low, high = heights(usual[:60]).quantile(torch.tensor([0.1, 0.9]))
    assert ((low <= photos) & (photos <= high)).float().mean() > 0.7


def test_narrow_scenes_have_one_camera_and_the_same_toys():
    wide = scenes(300)
    narrow = []
    for number in range(300):
        rng = random.Random(number)
        narrow.append(sample_scene(rng, narrow=True))
        assert narrow[-1].toys == sample_scene(random.Random(number)).toys
    assert {(s.pitch, s.offset) for s in narrow} == {(0.18, (0.0, 0.0))}
    assert {s.variant for s in narrow} == {0.0, 0.5}
    singles = [s.distance for s in narrow if len(s.toys) == 1]
    assert 1.9 <= min(singles) < 1.93 and 2.27 < max(singles) <= 2.3
    assert len({s.pitch for s in wide}) > 50 and {s.variant for s in wide} == {0.0, 0.25, 0.5, 0.75}


def test_only_a_close_up_is_called_one_and_fixed_fields_win():
    rng = random.Random(6)
    toy = sample_toy(rng, "duck", colour="teal", pattern="striped")
    assert (toy.kind, toy.colour, toy.pattern) == ("duck", "teal", "striped")
    for scene in scenes(400):
        assert ("close-up" in caption(scene, rng)) <= (scene.distance < 1.9)
        assert 1.6 <= scene.distance <= 4 and (len(scene.toys) == 1 or scene.distance >= 2.1)


def test_training_never_shows_a_held_out_combination():
    looks = [(t.kind, t.colour, scene.place) for scene in scenes(1500) for t in scene.toys]
    assert not any(is_held_out(*combination) for combination in looks)
    rng = random.Random(1)
    held_out = [sample_scene(rng, held_out=True) for _ in range(20)]
    assert all(any(is_held_out(t.kind, t.colour, s.place) for t in s.toys) for s in held_out)
    table, count = list(product(KINDS, COLOURS, PLACES)), len(KINDS) * len(COLOURS) * len(PLACES)
    rows = [row for row in table if is_held_out(*row)]
    assert 0.04 < len(rows) / count < 0.08
    for position, names in enumerate((KINDS, COLOURS, PLACES)):
        for name, number in Counter(row[position] for row in rows).items():
            assert number / (count / len(names)) < 0.15, name


@pytest.mark.parametrize("colour", ["red", "green", "blue", "yellow"])
def test_the_named_colour_is_on_the_toy(colour):
    toy = Toy("bear", colour, "grey")
    mean = toy_pixels(Scene((toy,), "on a checkered floor", yaw=0.3)).mean(0)
    distances = {
        name: (mean / mean.norm() - torch.tensor(rgb) / torch.tensor(rgb).norm()).norm().item()
        for name, rgb in COLOURS.items()
        if name not in ("black", "grey", "white", "brown")
    }
    assert min(distances, key=distances.get) == colour


@pytest.mark.parametrize("kind", slow_but(("rocket", "bear", "train"), KINDS))
def test_the_toy_fills_the_frame_and_wears_its_main_colour(kind):
    scene = Scene((Toy(kind, "red", "blue"),), "in the snow", yaw=0.6, distance=2.4)
    assert 0.04 < len(toy_pixels(scene, 48)) / 48**2 < 0.6


@pytest.mark.parametrize("pattern", ["striped", "spotted", "checkered"])
def test_the_main_colour_covers_most_of_a_patterned_toy(pattern):
    scenes = [
        Scene((Toy("mug", "red", "blue", pattern),), "in the snow", yaw=yaw)
        for yaw in (0.2, 0.5, 0.8)
    ]
    pictures = render(scenes, 64).float()
    red = (pictures[..., 0] > 2 * pictures[..., 2]) & (pictures[..., 0] > 60)
    blue = (pictures[..., 2] > 2 * pictures[..., 0]) & (pictures[..., 2] > 60)
    masks = render_masks(scenes, 64)
    main, second = (red & masks).sum((1, 2)), (blue & masks).sum((1, 2))
    assert (second > 0.1 * main).all() and (main > second).all()


def test_captions_name_what_is_drawn():
    rng = random.Random(2)
    for scene in scenes(200, 3):
        canonical_caption = format_canonical_caption(scene)
        for toy in scene.toys:
            assert toy.kind in canonical_caption and toy.colour in canonical_caption
            assert toy.pattern == "plain" or (
                toy.pattern in canonical_caption and toy.colour2 in canonical_caption
            )
            assert toy.kind in caption(scene, rng)
        assert scene.place in canonical_caption
    named_scenes = [
        s.place in caption(s, rng) and s.toys[0].colour in caption(s, rng) for s in scenes(300, 4)
    ]
    assert sum(named_scenes) > 0.85 * len(named_scenes)
    second = [s.toys[0].colour2 in caption(s, rng) for s in scenes(300, 4)]
    assert sum(second) > 0.7 * len(second)
    toy = Toy("robot", "red", "white", "striped")
    assert (
        format_canonical_caption(Scene((toy,), "on the beach"))
        == "a photo of a red and white striped robot on the beach"
    )
    night = Scene((Toy("duck", "orange", "red", material="glossy"),), "on grass", light="night")
    assert format_canonical_caption(night) == "a photo of a glossy orange duck on grass at night"
    assert (
        add_article("orange duck") == "an orange duck" and add_article("blue car") == "a blue car"
    )


def test_a_scene_survives_json_and_only_what_is_wearable_is_worn():
    for scene in scenes(200):
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene
        assert all(set(toy.accessories) <= set(SHAPES[toy.kind].accessories) for toy in scene.toys)


def test_subjects_load_with_their_photos_and_masks():
    for name, toy in SUBJECTS.items():
        subject = load(name)
        photos = sample_photo_scenes(subject)
        assert (
            subject.toy == toy
            and subject.class_word == toy.kind
            and len({scene.place for scene in photos}) == 5
        )
        for number, mask in enumerate(render_masks(photos, 128)):
            with Image.open(FOLDER / name / f"{number:02d}.mask.png") as file:
                shipped = torch.from_numpy(
                    np.array(file.resize((128, 128), Image.Resampling.NEAREST))
                )
            assert (shipped != mask).float().mean() < 0.02 < mask.float().mean()


def test_individuals_differ_and_are_of_all_kinds():
    individuals = sample_individuals(40, seed=1)
    assert {individual.toy.kind for individual in individuals} == set(KINDS) and len(
        {individual.name for individual in individuals}
    ) == 40
    assert len(
        {individual.toy for individual in individuals + sample_individuals(40, seed=2)}
    ) == 80 and individuals == sample_individuals(40, seed=1)
    assert max(abs(gene) for individual in individuals for gene in individual.toy.genes) > 1
    with pytest.raises(SystemExit):
        make_subjects.main(["--individuals", "2"])
    with pytest.raises(FileNotFoundError, match="make_subjects"):
        load("nobody")


@pytest.mark.parametrize("narrow", [False, True])
def test_shard_is_whole_and_repeatable(narrow, tmp_path):
    shard = Shard(tmp_path, 0, 2, 7, 16, "cpu", compiled=False, narrow=narrow)
    first = write_shard(shard).images_path.read_bytes()
    assert shard.is_done and write_shard(shard).images_path.read_bytes() == first
    rows = [json.loads(line) for line in shard.scenes_path.read_text().splitlines()]
    assert [set(row) for row in rows] == [{"scene", "caption", "canonical_caption"}] * 2
    assert all(row["scene"]["offset"] == [0, 0] for row in rows) == narrow
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("every", [False, True])
def test_only_the_judge_is_shown_held_out_combinations(every, tmp_path):
    shard = Shard(tmp_path, 0, 200, 7, 2, "cpu", compiled=False, all_combinations=every)
    rows = [
        json.loads(line)["scene"]
        for line in write_shard(shard).scenes_path.read_text().splitlines()
    ]
    assert (
        any(is_held_out(t["kind"], t["colour"], row["place"]) for row in rows for t in row["toys"])
        == every
    )


@pytest.mark.slow
def test_work_in_pieces_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    kinds, images = render_views.load_block(range(3, 5), 2, tmp_path / "pieces")
    expected = render_views.render_block(range(3, 5), 2)
    assert (
        kinds == expected[0]
        and (images == expected[1]).all()
        and images.shape == (2, 2, 128, 128, 3)
    )
    monkeypatch.setattr(render_views, "render_block", lambda *_: pytest.fail("rendered twice"))
    again = render_views.load_block(range(3, 5), 2, tmp_path / "pieces")
    assert again[0] == kinds and (again[1] == images).all()
    assert not list(tmp_path.rglob("*.tmp"))
