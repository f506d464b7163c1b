"""From an adapter to its scores on the tiny random pipeline, and the toy world's truth on real renders."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from dreambooth_moslora.core import UserError
from dreambooth_moslora.evaluation.evaluate import Evaluation, Evaluator, evaluate_adapter, paint_over, truth_of
from dreambooth_moslora.evaluation.metrics import picture_distance
from dreambooth_moslora.evaluation.protocol import EvaluationPlan, plan_for
from dreambooth_moslora.evaluation.report import rows_beside
from dreambooth_moslora.generation.fixed_seeds import SampleRequest
from dreambooth_moslora.settings.measures import MEASURES
from dreambooth_moslora.settings.prompts import Subject
from tests.helpers.tiny_adapters import save_diffusers_lora
from tests.helpers.tiny_encoders import tiny_encoders
from toybox.readers.judge import QUESTIONS, Reading
from toybox.render import render
from toybox.truth import find_truth, other_toy, place_in, stacked, view
from toybox.world import Toy, sample_scene

PLAN = EvaluationPlan(
    Subject("sks", "duck"),
    ("a photo of a {} on the beach", "a photo of a {} in the snow", "a photo of a {} on lava"),
    ("a photo of a red car on water",),
    seeds=(0, 1),
    class_images=2,
    inference_steps=2,
)
TOY = Toy("duck", "pink", "blue", "checkered", "matte", (-0.3, 0.4, 0.6, 0.5), ("top hat",))


def toy_pictures(toy: Toy, places: list[str], seed: int = 0) -> list[Image.Image]:
    rng = random.Random(seed)
    pictures = render([sample_scene(rng, toy, place, held_out=None) for place in places], 64)
    return [Image.fromarray(picture.numpy()) for picture in pictures]


@pytest.fixture(scope="module")
def photos():
    return toy_pictures(TOY, ["on grass", "on the beach", "in a kitchen"])


def stub_pictures(requests: list[SampleRequest]) -> list[Image.Image]:
    """A picture for each request that depends on nothing but the request."""
    seeds = [[*request.prompt.encode(), request.seed] for request in requests]
    return [Image.fromarray(np.random.default_rng(s).integers(0, 256, (32, 32, 3), dtype=np.uint8)) for s in seeds]


def test_the_plan_asks_the_base_without_the_token_at_the_same_seeds():
    subject, base = PLAN.subject_requests, PLAN.base_requests
    assert subject[0] == SampleRequest("a photo of a sks duck on the beach", 0)
    assert base[0] == SampleRequest("a photo of a duck on the beach", 0)
    assert [r.seed for r in subject] == [r.seed for r in base] == [0, 1] * 3
    assert set(PLAN.prompts) >= {"a photo of a duck", "a photo of a red car on water"}


def test_plans_by_kind_of_subject():
    assert len(plan_for("toy", Subject("sks", "duck")).templates) == 16
    assert not any("duck" in prompt for prompt in plan_for("toy", Subject("sks", "duck")).unrelated)
    dog, mug = (plan_for("some/base", Subject("sks", word)).templates for word in ("corgi dog", "mug"))
    assert len(dog) == len(mug) == 25 and dog != mug and "a {} wearing a santa hat" in dog
    with pytest.raises(UserError, match="choose one of"):
        plan_for("toy", Subject("sks", "duck"), "nonsense")
    with pytest.raises(UserError, match=r"hold \{\}"):
        EvaluationPlan(Subject("sks", "duck"), ("a duck",), ())


def test_a_smaller_plan_is_spread_over_the_templates():
    small = plan_for("toy", Subject("sks", "duck")).smaller(templates=4, seeds=1, class_images=2, unrelated=2)
    full = plan_for("toy", Subject("sks", "duck")).templates
    assert small.templates == (full[0], full[4], full[8], full[12])
    assert (small.seeds, small.class_images, len(small.unrelated)) == ((0,), 2, 2)


def test_an_adapter_is_scored_in_tables_of_prompts_and_seeds(subject, encoders, photos, tmp_path):
    subject.load_adapter(save_diffusers_lora(subject.pipeline.unet, tmp_path, size=2.0), "one")
    evaluator = Evaluator(PLAN, encoders, photos)
    found = evaluate_adapter(subject, "one", evaluator)
    assert {name: t.shape for name, t in found.tables.items()} == {
        **dict.fromkeys(("dino", "clip_i", "clip_t", "dino_base", "clip_i_base", "clip_t_base", "copy_index"), (3, 2)),
        **dict.fromkeys(("diversity", "diversity_base"), (3, 1)),
        **dict.fromkeys(("pres", "pres_base"), (2,)),
        **dict.fromkeys(("class_diversity", "class_diversity_base"), (1, 1)),
        "drift": (1, 2),
        "drift_base_spread": (1, 1),
    }
    assert found.mean("drift") > 1e-4  # the adapter changed what the base draws
    assert 0 <= found.score <= 1
    assert len(found.pictures["subject"]) == len(found.pictures["subject_base"]) == 6


def test_the_bare_prompt_is_scored_beside_the_others_which_stay_as_they_were(encoders, photos):
    """A picture for the bare prompt is a photo; for any other prompt it is none."""

    def draw(requests, on):
        pictures = stub_pictures(requests)
        return [photos[0] if r.prompt == "a photo of sks duck" else p for r, p in zip(requests, pictures)]

    plan = replace(PLAN, bare_prompt="a photo of sks duck")
    assert set(plan.prompts) - set(PLAN.prompts) == {"a photo of sks duck"}
    without, found = (Evaluator(one, encoders, photos)(draw) for one in (PLAN, plan))
    assert found.tables["dino_bare"].shape == (1, 2) and len(found.pictures["bare"]) == 2
    likeness = encoders.dino_images(photos)
    assert found.mean("dino_bare") == pytest.approx(float((likeness[:1] @ likeness.T).mean()), abs=1e-5)
    assert {name for name in found.tables if name not in without.tables} == {"dino_bare"}
    assert all(np.array_equal(table, found.tables[name]) for name, table in without.tables.items())
    assert found.score == without.score and found.alarm == without.alarm
    swept = Evaluator(plan, encoders, photos).of_subject()(draw)
    assert "dino_bare" not in swept.tables


def test_a_class_that_has_become_one_picture_has_no_diversity(encoders, photos):
    def draw(requests, on):
        return [photos[0]] * len(requests) if on else stub_pictures(requests)

    found = Evaluator(PLAN, encoders, photos)(draw)
    assert found.mean("class_diversity") == pytest.approx(0, abs=1e-5) and found.mean("class_diversity_base") > 1e-3
    assert found.means()["class_diversity_of_base"] == pytest.approx(0, abs=1e-3)


def test_an_adapter_that_is_off_does_not_drift_and_scores_the_same_twice(subject, encoders, photos, tmp_path):
    subject.load_adapter(save_diffusers_lora(subject.pipeline.unet, tmp_path), "one")
    evaluator = Evaluator(PLAN, encoders, photos)
    off, on, again = (evaluate_adapter(subject, "one", evaluator, scale=s) for s in (0.0, 1.0, 1.0))
    assert off.mean("drift") == pytest.approx(0, abs=1e-6)
    assert off.mean("pres") == pytest.approx(off.mean("pres_base"), abs=1e-6)
    for name, table in on.tables.items():
        assert np.array_equal(table, again.tables[name]), name


def test_the_batch_does_not_change_the_scores(subject, encoders, photos, tmp_path):
    subject.load_adapter(save_diffusers_lora(subject.pipeline.unet, tmp_path), "one")
    one, six = (evaluate_adapter(subject, "one", Evaluator(PLAN, encoders, photos), n) for n in (1, 6))
    for name, table in one.tables.items():
        assert np.abs(table - six.tables[name]).max() < 0.02, name


def test_copies_of_the_photos_set_off_the_alarm_and_lower_the_score(encoders, photos):
    pixels = replace(encoders)
    pixels.clip_images = pixels.dino_images = small_pixels
    pixels.clip_texts = encoders_of_length(192)
    fresh = Evaluator(PLAN, pixels, photos)(lambda requests, on: stub_pictures(requests))
    copies = Evaluator(PLAN, pixels, photos)(
        lambda requests, on: [photos[n % 3] for n in range(len(requests))] if on else stub_pictures(requests)
    )
    assert copies.alarm.raised and copies.alarm.share == 1 and copies.score == 0
    assert copies.mean("copy_index") == pytest.approx(1, abs=1e-3)
    assert not fresh.alarm.raised


def test_diversity_is_by_lpips_where_it_is_at_hand_and_drift_stays_on_dino(encoders, photos):
    def draw(requests: list[SampleRequest], on: bool) -> list[Image.Image]:
        return stub_pictures(requests)

    by_dino = Evaluator(PLAN, encoders, photos)(draw)
    model = lambda a, b: (a - b).square().mean()  # noqa: E731 (called as LPIPS is: two pictures in [-1, 1])
    by_pixels = Evaluator(PLAN, replace(encoders, lpips=picture_distance(model, "cpu")), photos)(draw)
    first, second = (np.array(p, dtype=float) / 127.5 - 1 for p in by_pixels.pictures["subject"][:2])
    assert by_pixels.tables["diversity"][0, 0] == pytest.approx(np.square(first - second).mean(), rel=1e-4)
    assert np.array_equal(by_pixels.tables["drift_base_spread"], by_dino.tables["drift_base_spread"])


@pytest.mark.parametrize(
    "text, said", [("{", "not valid JSON"), ('{"toy": {"kind": "robot"}}', "KeyError"), ('{"toy": 3}', "TypeError")]
)
def test_a_damaged_subject_file_is_one_clear_line(encoders, tmp_path, text, said):
    (tmp_path / "subject.json").write_text(text)
    with pytest.raises(UserError, match=said):
        find_truth(tmp_path, encoders)


def test_masks_give_the_background_alone_and_a_leak(encoders, photos):
    mask = Image.new("L", photos[0].size, 0)
    mask.paste(255, (10, 10, 30, 30))
    alone = np.array(paint_over(photos[0], mask))
    assert (alone[15:25, 15:25] == 128).all() and (alone[40:, 40:] == np.array(photos[0])[40:, 40:]).all()
    evaluator = Evaluator(PLAN, encoders, photos, [mask, None, None])
    leaked = evaluator(
        lambda requests, on: [paint_over(photos[0], mask)] * len(requests) if on else stub_pictures(requests)
    )
    assert leaked.mean("background_leak") > 0


def test_the_truth_is_found_beside_toy_photos_only(encoders, tmp_path):
    assert find_truth(tmp_path, encoders) is None
    (tmp_path / "subject.json").write_text(json.dumps({"toy": TOY.to_dict(), "class_word": "duck", "token": "sks"}))
    assert find_truth(tmp_path, encoders).toy == TOY


def test_true_renders_score_at_the_ceiling_and_others_at_the_floor(tmp_path, photos):
    """With an encoder that sees colour (mean RGB), the individual and another of its kind are told apart."""
    (tmp_path / "subject.json").write_text(json.dumps({"toy": TOY.to_dict()}))
    encoders = tiny_encoders(tmp_path / "encoders")
    encoders.dino_images = mean_colours
    truth = find_truth(tmp_path, encoders, size_px=64)
    places = [place_in(template) for template in PLAN.templates]
    true = toy_pictures(TOY, [p for p in places for _ in PLAN.seeds], seed=1)
    other = toy_pictures(other_toy(TOY, random.Random(3)), [p for p in places for _ in PLAN.seeds], seed=1)
    photo_vectors = mean_colours(photos)
    good, bad = (truth.tables(PLAN, some, mean_colours(some), photo_vectors) for some in (true, other))
    assert good["truth"].mean() > bad["truth"].mean()
    assert good["truth_ceiling"].mean() > good["truth_floor"].mean()
    renders = Image.fromarray(render([view(random.Random(f"true {places[1]} {TOY}"), TOY, places[1])], 64)[0].numpy())
    said = encoders.clip_images([renders]) @ encoders.clip_texts(PLAN.texts).T
    assert good["clip_t_ceiling"][1, 0] == pytest.approx(float(said[0, 1]), abs=1e-5)
    assert abs(good["truth"].mean() - good["truth_ceiling"].mean()) < abs(
        bad["truth"].mean() - good["truth_ceiling"].mean()
    )
    soft = [picture.filter(ImageFilter.BoxBlur(2)) for picture in true]
    blurred = truth.tables(PLAN, soft, mean_colours(soft), photo_vectors)
    assert {f"judge_{name}{end}" for name in QUESTIONS for end in ("", "_ceiling")} <= good.keys()
    assert good["judge_kind_ceiling"].shape == (3, 3)
    assert good["sharpness"].mean() > max(good["sharpness_ceiling"].mean(), 1.5 * blurred["sharpness"].mean())


def test_the_judge_is_asked_for_all_looks_of_the_subject_in_the_place_of_each_prompt(encoders, tmp_path):
    (tmp_path / "subject.json").write_text(json.dumps({"toy": TOY.to_dict()}))
    truth = find_truth(tmp_path, encoders, size_px=64)
    first = Reading("duck", "pink", "blue", "on the beach", frozenset({"top hat"}), (1.0,) * 5)
    wrong = replace(first, colour2="red", ornaments=frozenset({"top hat", "bow"}))
    truth.judge = SimpleNamespace(read=lambda images: [first, wrong, first, first, first, first])
    pictures = [Image.new("RGB", (64, 64))] * 6
    found = truth._right([place_in(t) for t in PLAN.templates], stacked(pictures), len(PLAN.seeds))
    assert found["judge_ornaments"].tolist() == found["judge_colour2"].tolist() == [[1, 0], [1, 1], [1, 1]]
    assert found["judge_place"].tolist() == [[1, 1], [0, 0], [0, 0]] and found["judge_kind"].all()


def test_the_report_shows_what_the_judge_reads_beside_true_renders():
    tables = {n + end: np.ones((3, 2)) for n in ("truth", "dino", "clip_t") for end in ("", "_ceiling", "_floor")}
    tables |= {"judge_ornaments": np.zeros((3, 2)), "judge_ornaments_ceiling": np.ones((3, 3))}
    found = Evaluation(PLAN, tables, alarm=None, score=0.0, seconds=0.0)
    judges = [name for name, row in MEASURES.items() if row.kind == "judge"]
    ((title, drawn, ceiling),) = rows_beside(found, judges, ("_ceiling",))
    assert title.startswith("ornaments") and str(drawn) == "0.000 [0.000, 0.000]" and ceiling.mean == 1


def small_pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """Unit vectors of the pictures themselves at 8 x 8: an encoder that knows a copy from anything else."""
    small = [torch.from_numpy(np.array(p.resize((8, 8)), dtype=np.float32)).flatten() - 128 for p in pictures]
    return torch.nn.functional.normalize(torch.stack(small), dim=-1)


def encoders_of_length(width: int):
    """A text encoder whose vectors fit `small_pixels`."""
    return lambda texts: torch.nn.functional.normalize(torch.ones(len(texts), width), dim=-1)


def mean_colours(pictures: list[Image.Image]) -> torch.Tensor:
    """Unit vectors of the middle's mean colour, shifted so that colours differ in direction."""
    middles = [torch.from_numpy(np.array(p)[16:48, 16:48].astype(np.float32)).mean((0, 1)) - 128 for p in pictures]
    return torch.nn.functional.normalize(torch.stack(middles), dim=-1)


def test_the_truth_is_asked_of_the_toy_base_in_places_that_it_knows_only(encoders, tmp_path):
    (tmp_path / "subject.json").write_text(json.dumps({"toy": TOY.to_dict(), "class_word": "duck", "token": "sks"}))
    assert place_in("a photo of a {} on a checkered floor") == "on a checkered floor"
    elsewhere = replace(PLAN, templates=("a {} wearing a santa hat",))
    assert truth_of("toy", tmp_path, PLAN, encoders, 64).toy == TOY
    assert truth_of("some/base", tmp_path, PLAN, encoders, 64) is None
    assert truth_of("toy", tmp_path, elsewhere, encoders, 64) is None
    assert truth_of("toy", None, PLAN, encoders, 64) is None


def test_places_that_the_captions_name_are_not_asked_for():
    duck = Subject("sks", "duck")
    templates = plan_for("toy", duck, captions=["a photo of a sks duck on grass", "A sks duck ON LAVA"]).templates
    assert len(templates) == 14 and not any("on grass" in t or "on lava" in t for t in templates)
    everywhere = plan_for("toy", duck).texts
    assert plan_for("toy", duck, captions=everywhere).templates == plan_for("toy", duck).templates
    assert "a red {}" in plan_for("some/base", Subject("sks", "mug"), captions=["red"]).templates  # no place


def test_a_likeness_of_an_animal_is_a_thing():
    alive, stuffed = (plan_for("some/base", Subject("sks", w)).templates for w in ("dog", "stuffed dog"))
    assert alive != stuffed == plan_for("some/base", Subject("sks", "mug")).templates


def test_drift_sees_a_change_of_place(encoders, photos):
    """An encoder that looks at the thing alone finds none."""
    blind = replace(encoders)
    blind.dino_images = lambda pictures: torch.nn.functional.normalize(torch.ones(len(pictures), 4), dim=-1)
    blind.clip_images, blind.clip_texts = small_pixels, encoders_of_length(192)
    found = Evaluator(PLAN, blind, photos)(
        lambda requests, on: [photos[0]] * len(requests) if on else stub_pictures(requests)
    )
    assert found.mean("drift") > 0.01
