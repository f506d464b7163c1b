"""The measures of the base: shares with their intervals, sharpness, distances of pictures, and the
model card."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from toybox.captions import format_full_caption
from toybox.data.renders import to_pixels, to_uint8
from toybox.measures import evaluate_base
from toybox.measures.evaluate_base import (
    compute_wilson_interval,
    list_told,
    load_or_generate,
    measure_accuracy,
    sample_scenes,
)
from toybox.measures.model_card import PARTS, render_card
from toybox.measures.model_card import QUESTIONS as ASKED
from toybox.measures.sharpness import measure_sharpness
from toybox.measures.swd import (
    build_laplacian_pyramid,
    compute_distances,
    compute_sliced_wasserstein,
    filter_binomial,
)
from toybox.readers.judge import QUESTIONS, Reading
from toybox.render import render, render_masks
from toybox.world import Scene, Toy, sample_scene

PLAIN = Scene((Toy("duck", "red", "white"),), "on grass")
DRESSED = Scene((Toy("duck", "red", "white", accessories=("scarf",)),), "on grass")
STRIPED = Scene((Toy("duck", "red", "white", "striped"),), "on grass")
SCENES = [sample_scene(random.Random(seed)) for seed in range(3)]
SHARES = {name: 0.9 for name in ASKED if name != "ornaments_worn"}
INTERVALS = {name: [0.81, 0.95, 70] for name in SHARES}


def test_a_question_is_asked_where_the_prompt_tells_the_answer():
    def names(scene, full):
        return {name for name, is_told in list_told(scene, full).items() if is_told}

    assert names(PLAIN, False) == set(QUESTIONS) - {"colour2"}
    assert names(DRESSED, False) == set(QUESTIONS) - {"colour2", "ornaments"}
    assert names(STRIPED, False) == names(DRESSED, True) == set(QUESTIONS)


def test_shares_have_wilsons_intervals(monkeypatch):
    looks = (("red", "blue", ()), ("blue", "white", ("scarf",)), ("red", "white", ("bow",)))
    readings = [
        Reading("duck", *colours, "on grass", frozenset(worn), (1.0,) * 5)
        for *colours, worn in looks
    ]
    monkeypatch.setattr(
        evaluate_base.judge, "load", lambda: SimpleNamespace(read=lambda images: readings)
    )
    images, scenes = torch.zeros(3, 8, 8, 3), [PLAIN, DRESSED, STRIPED]
    accuracy = measure_accuracy(images, scenes)
    assert accuracy["kind"] == 1 and accuracy["colour"] == accuracy["all"] == pytest.approx(
        2 / 3, abs=1e-4
    )
    assert (
        accuracy["colour2"] == 1
        and accuracy["ornaments"] == 0.5
        and "ornaments_worn" not in accuracy
    )
    assert (
        accuracy["intervals"]["colour2"] == (*compute_wilson_interval(1, 1), 1)
        and accuracy["intervals"]["ornaments"][2] == 2
    )
    assert compute_wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert (compute_wilson_interval(0, 10)[0], compute_wilson_interval(10, 10)[1]) == (0, 1)
    full_accuracy = measure_accuracy(images, scenes, full=True)
    assert (
        full_accuracy["colour2"] == full_accuracy["ornaments"] == pytest.approx(2 / 3, abs=1e-4)
        and full_accuracy["ornaments_worn"] == 1
    )


def test_full_captions_name_the_pattern_or_ornament():
    for scene in sample_scenes(40, held_out=False, seed=1, full=True):
        (toy,) = scene.toys
        caption = format_full_caption(scene)
        assert toy.pattern != "plain" or toy.accessories
        assert all(
            name in caption for name in (toy.kind, toy.colour2, scene.place, *toy.accessories)
        )
    assert (
        format_full_caption(DRESSED)
        == "a photo of a red duck with white parts and a red scarf on grass"
    )
    assert format_full_caption(STRIPED) == "a photo of a red and white striped duck on grass"


def test_pictures_are_drawn_once(tmp_path, monkeypatch):
    calls = []

    def generate(pipeline, prompts, **options):
        calls.append((prompts, options))
        return torch.full((len(prompts), 2, 2, 3), 7, dtype=torch.uint8)

    monkeypatch.setattr(evaluate_base, "generate", generate)
    first, second = (
        load_or_generate(tmp_path / "a_at_2.5.npy", None, ["x", "y"], seed=1) for _ in range(2)
    )
    assert (
        torch.equal(first, second)
        and first.shape == (2, 2, 2, 3)
        and calls == [(["x", "y"], {"seed": 1})]
    )


def test_a_blurred_toy_has_less_and_a_sharpened_one_more():
    images, masks = render(SCENES), render_masks(SCENES, 128)
    pixels = to_pixels(images)
    soft = filter_binomial(pixels)
    true = measure_sharpness(images, masks)
    assert (measure_sharpness(to_uint8(soft), masks) < 0.75 * true).all()
    assert (measure_sharpness(to_uint8((2 * pixels - soft).clamp(-1, 1)), masks) > 1.2 * true).all()


def test_what_is_beside_the_toy_does_not_count():
    images, masks = render(SCENES), render_masks(SCENES, 128)
    inner = -torch.nn.functional.max_pool2d(-masks[:, None].float(), 25, 1, 12)[:, 0] > 0
    inner[:, 0] = False
    noisy = torch.where(masks[..., None], images, torch.randint_like(images, 256))
    assert inner.any()
    torch.testing.assert_close(measure_sharpness(noisy, inner), measure_sharpness(images, inner))
    assert (measure_sharpness(images, torch.zeros_like(masks)) == 0).all()


@pytest.fixture(scope="module")
def renders() -> tuple[Tensor, Tensor]:
    """Two times 24 renders, uint8 (24,64,64,3)."""
    rng = random.Random(3)
    return tuple(render([sample_scene(rng) for _ in range(24)], 64) for _ in range(2))


def blurred(pictures: Tensor) -> Tensor:
    return filter_binomial(pictures.permute(0, 3, 1, 2).float()).round().byte().permute(0, 2, 3, 1)


def test_moved_points_are_as_far_as_the_projected_move():
    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(1))
    far = compute_sliced_wasserstein(points, points + torch.tensor([3.0, 4.0]), directions=4000)
    assert far == pytest.approx(5 * 2 / torch.pi, rel=0.03), "the mean of |cos| is 2/π"
    assert compute_sliced_wasserstein(points, points[torch.randperm(500)]) == pytest.approx(
        0, abs=1e-6
    )


def test_the_levels_of_a_pyramid_add_up_to_the_picture():
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    *levels, coarsest = build_laplacian_pyramid(pictures)
    assert [level.shape[-1] for level in (*levels, coarsest)] == [64, 32, 16]
    for level in reversed(levels):
        coarsest = interpolate(coarsest, scale_factor=2, mode="bilinear") + level
    torch.testing.assert_close(coarsest, pictures)


@pytest.mark.slow
def test_noise_is_far_and_blur_shows_at_the_finest_level_alone(renders):
    references, changed = renders
    noise = torch.randint(
        0, 256, references.shape, generator=torch.Generator().manual_seed(0)
    ).byte()
    near, far = compute_distances(changed, references), compute_distances(noise, references)
    assert set(near) == {"64_px", "32_px", "16_px", "mean"}
    assert far["mean"] > 2 * near["mean"] and far["64_px"] > 3 * near["64_px"]
    same, smeared = (
        compute_distances(references, references),
        compute_distances(blurred(references), references),
    )
    assert smeared["64_px"] > 3 * same["64_px"] and smeared["16_px"] < 1.5 * same["16_px"] + 5


def scores() -> dict:
    values = SHARES | {"intervals": INTERVALS}
    generated = values | {"swd": {"128_px": 30.0, "mean": 31.0}}
    return {"guidance": 2.5, "seen combinations": {"generated": generated, "renders": values}}


def test_a_part_in_work_replaces_its_lines_and_the_others_stay(tmp_path):
    (tmp_path / "judge").mkdir()
    logs = [
        {"step": 50, "loss": 4.0, "step_sec": 1.0},
        {"step": 1000, "loss": 0.5, "step_sec": 1.8},
    ]
    (tmp_path / "judge" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logs))
    (tmp_path / "judge" / "report.json").write_text(json.dumps({"kind_accuracy": 0.99}))
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "scores.json").write_text(json.dumps(scores()))
    rows = [f"| {PARTS['vae']} | 5000 | 0.9 | 0.235 → 0.151 |", f"- {PARTS['vae']}: psnr_db 31.3"]
    shipped = "- as shipped, on fresh renders: vae_psnr_db 30.83"
    card = render_card(
        tmp_path, "\n".join([*rows, shipped, f"- {PARTS['judge']}: kind_accuracy 0.1"])
    ).splitlines()
    assert {*rows, shipped} <= set(card)
    assert f"| {PARTS['judge']} | 1000 | 0.5 | 4.000 → 0.500 |" in card
    assert (
        f"- {PARTS['judge']}: kind_accuracy 0.99" in card
        and f"- {PARTS['judge']}: kind_accuracy 0.1" not in card
    )
    share = "90.0 [81.0, 95.0] of 70"
    cells = " | ".join("–" if name == "ornaments_worn" else share for name in ASKED)
    assert f"| seen combinations | renders | {cells} |" in card
    assert not any(line.startswith("On two cores") for line in card)
    clock = "On two cores: 0.26 s to load, 3.05 s for four images."
    assert clock in render_card(tmp_path, clock).splitlines(), (
        "no timings were taken: the old ones stay"
    )
    figures = scores() | {"timings": {"load_sec": 0.3, "four_images_sec": 4}}
    (tmp_path / "evaluation" / "scores.json").write_text(json.dumps(figures))
    assert (
        "On two cores: 0.3 s to load, 4 s for four images."
        in render_card(tmp_path, clock).splitlines()
    )
    assert (
        "Sliced Wasserstein distance to renders, seen combinations: 128 px 30.0, mean 31.0." in card
    )
