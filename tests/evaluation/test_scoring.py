"""From an adapter to its scores on the tiny random pipeline, the toy world's truth, and several
subjects."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from matplotlib.figure import Figure
from PIL import Image, ImageFilter
from torch.nn.functional import normalize

from dreambooth_moslora.base import decode, devices, load
from dreambooth_moslora.cli.command_evaluate import format_summary
from dreambooth_moslora.disk.events import StepEvaluated, parse_record
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.evaluation import metrics, report
from dreambooth_moslora.evaluation.metrics import load_encoders
from dreambooth_moslora.evaluation.protocol import EvaluationPlan, build_plan
from dreambooth_moslora.evaluation.scoring import (
    Evaluation,
    Evaluator,
    compute_fidelity,
    evaluate_adapter,
    load_truth,
    mask_subject,
)
from dreambooth_moslora.generation import offload as gpu_room
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.generation.sampling import SampleRequest
from dreambooth_moslora.photos.folder import build_photo_report
from dreambooth_moslora.settings.metric_kinds import METRICS, Metric
from dreambooth_moslora.settings.prompts import SubjectWords
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import model_card, run_plots
from dreambooth_moslora.training.run_advice import list_advice
from dreambooth_moslora.training.run_metrics import RunMetrics
from tests.helpers.tiny_adapters import save_diffusers_lora
from tests.helpers.tiny_encoders import tiny_encoders
from toybox.readers.judge import QUESTIONS, Reading
from toybox.render import render
from toybox.truth import find_place, find_truth, sample_other_toy, sample_view, stack_images
from toybox.world import Toy, sample_scene

PLAN = EvaluationPlan(
    SubjectWords("sks", "duck"),
    ("a photo of a {} on the beach", "a photo of a {} in the snow", "a photo of a {} on lava"),
    ("a photo of a red car on water",),
    seeds=(0, 1),
    class_images=2,
    inference_steps=2,
)
TOY = Toy("duck", "pink", "blue", "checkered", "matte", (-0.3, 0.4, 0.6, 0.5), ("top hat",))
ROCKET = Toy("rocket", "white", "red", "striped", "glossy", (0.3, 0.5, -0.2, 0.8), ("flag",))
BOTH = report.ReportContext("both", "toy", ("clip", "dino"), 2, 7.0)


def toy_pictures(toy: Toy, places: list[str], seed: int = 0) -> list[Image.Image]:
    rng = random.Random(seed)
    pictures = render([sample_scene(rng, toy, place, held_out=None) for place in places], 64)
    return [Image.fromarray(picture.numpy()) for picture in pictures]


@pytest.fixture(scope="module")
def photos():
    return toy_pictures(TOY, ["on grass", "on the beach", "in a kitchen"])


def make_stub_pictures(
    requests: list[SampleRequest], with_adapter: bool = False
) -> list[Image.Image]:
    """Return an image for each request that depends on the request alone."""
    seeds = [[*request.prompt.encode(), request.seed] for request in requests]
    return [
        Image.fromarray(np.random.default_rng(s).integers(0, 256, (32, 32, 3), dtype=np.uint8))
        for s in seeds
    ]


def test_plans_by_kind_of_subject():
    """Check also that the base gets no token, and that places in captions are left out."""
    subject, base = PLAN.subject_requests, PLAN.base_requests
    assert subject[0] == SampleRequest("a photo of a sks duck on the beach", 0)
    assert base[0] == SampleRequest("a photo of a duck on the beach", 0)
    assert [r.seed for r in subject] == [r.seed for r in base] == [0, 1] * 3
    assert set(PLAN.prompts) >= {"a photo of a duck", "a photo of a red car on water"}
    duck = SubjectWords("sks", "duck")
    full = build_plan("toy", duck)
    assert len(full.templates) == 16 and not any("duck" in prompt for prompt in full.unrelated)
    kinds = ("corgi dog", "stuffed dog", "mug")
    dog, stuffed, mug = (
        build_plan("some/base", SubjectWords("sks", kind)).templates for kind in kinds
    )
    assert len(dog) == len(mug) == 25 and dog != mug and "a {} wearing a santa hat" in dog
    assert stuffed == mug, "a likeness of an animal is a thing"
    # spread over the templates
    small = full.reduce_plan(templates=4, seeds=1, class_images=2, unrelated=2)
    assert small.templates == full.templates[0:13:4]
    assert (small.seeds, small.class_images, len(small.unrelated)) == ((0,), 2, 2)
    with pytest.raises(UserError, match="choose one of"):
        build_plan("toy", duck, "nonsense")
    with pytest.raises(UserError, match=r"hold \{\}"):
        EvaluationPlan(duck, ("a duck",), ())
    templates = build_plan(
        "toy", duck, captions=["a photo of a sks duck on grass", "A sks duck ON LAVA"]
    ).templates
    assert len(templates) == 14 and not any("on grass" in t or "on lava" in t for t in templates)
    assert build_plan("toy", duck, captions=full.texts).templates == full.templates
    # no place
    assert (
        "a red {}"
        in build_plan("some/base", SubjectWords("sks", "mug"), captions=["red"]).templates
    )


def make_fixed_generator(*pictures: Image.Image):
    """Return a generator of these images by the adapter, and of stub images by the base."""

    def draw(requests: list[SampleRequest], with_adapter: bool) -> list[Image.Image]:
        return (
            [pictures[n % len(pictures)] for n in range(len(requests))]
            if with_adapter
            else make_stub_pictures(requests)
        )

    return draw


def write_subject(folder):
    (folder / "subject.json").write_text(
        json.dumps({"toy": TOY.to_dict(), "class_word": "duck", "token": "sks"})
    )
    return folder


def test_an_adapter_is_scored_in_tables_of_prompts_and_seeds(subject, encoders, photos, tmp_path):
    """Score twice, in a batch, and with the adapter off, which does not drift."""
    subject.load_adapter(save_diffusers_lora(subject.pipeline.unet, tmp_path, size=2.0), "one")
    evaluator = Evaluator(PLAN, encoders, photos)
    evaluation, again, off = (
        evaluate_adapter(subject, "one", evaluator, scale=scale) for scale in (1.0, 1.0, 0.0)
    )
    assert {name: t.shape for name, t in evaluation.tables.items()} == {
        **dict.fromkeys(
            ("dino", "clip_i", "clip_t", "dino_base", "clip_i_base", "clip_t_base", "copy_index"),
            (3, 2),
        ),
        **dict.fromkeys(("diversity", "diversity_base"), (3, 1)),
        **dict.fromkeys(("pres", "pres_base"), (2,)),
        "drift": (1, 2),
        "drift_base_spread": (1, 1),
    }
    assert evaluation.mean("drift") > 1e-4  # the adapter changed what the base draws
    assert 0 <= evaluation.score <= 1
    assert len(evaluation.pictures["subject"]) == len(evaluation.pictures["subject_base"]) == 6
    assert off.mean("drift") == pytest.approx(0, abs=1e-6)
    assert off.mean("pres") == pytest.approx(off.mean("pres_base"), abs=1e-6)
    single, batched = (
        evaluate_adapter(subject, "one", Evaluator(PLAN, encoders, photos), n) for n in (1, 6)
    )
    for name, table in evaluation.tables.items():
        assert np.array_equal(table, again.tables[name]), name
        assert np.abs(single.tables[name] - batched.tables[name]).max() < 0.02, name


@pytest.mark.slow
def test_models_take_turns_on_a_small_gpu(tiny_base, encoders, photos, tmp_path, monkeypatch):
    """Check that inputs go to the device where the model computes."""
    file = save_diffusers_lora(SubjectPipeline.from_base(tiny_base).pipeline.unet, tmp_path)
    used_devices = []

    def evaluate(device: str) -> Evaluation:
        subject = SubjectPipeline.from_base(tiny_base, device=device)
        subject.load_adapter(file, "one")
        unet = subject.pipeline.unet
        unet.register_forward_hook(lambda *_: used_devices.append(devices.get_device(unet)))
        return evaluate_adapter(
            subject, "one", Evaluator(PLAN.reduce_plan(1, 1, 1, 1, 1), encoders, photos)
        )

    expected = evaluate("cpu")
    monkeypatch.setattr(devices, "measure_free_gib", lambda device: 1e-6)
    monkeypatch.setattr(gpu_room, "MIN_FREE_BESIDE_MODEL_GIB", -1.0)
    assert all(
        np.array_equal(table, expected.tables[name])
        for name, table in evaluate("cpu:0").tables.items()
    )
    half = len(used_devices) // 2
    assert used_devices == [torch.device("cpu")] * half + [torch.device("cpu:0")] * half
    pipeline = SubjectPipeline.from_base(tiny_base).pipeline
    for model in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae):
        cpu_offload_with_hook(model, torch.device("meta"))
    (text,) = load.SDXL_FAMILY.encode_prompts(pipeline, ["a dog"])
    pixels = decode.decode_latents(pipeline.vae, torch.zeros(1, 4, 4, 4))
    assert {tensor.device.type for tensor in (*text.values(), pixels)} == {"meta"}


def test_the_bare_prompt_does_not_change_other_scores(encoders, photos):
    """Return a photo for the bare prompt, and another image for any other prompt."""

    def draw(requests, on):
        pictures = make_stub_pictures(requests)
        return [
            photos[0] if r.prompt == "a photo of sks duck" else p
            for r, p in zip(requests, pictures)
        ]

    plan = replace(PLAN, bare_prompt="a photo of sks duck")
    assert set(plan.prompts) - set(PLAN.prompts) == {"a photo of sks duck"}
    without, evaluation = (
        Evaluator(each_plan, encoders, photos)(draw) for each_plan in (PLAN, plan)
    )
    assert evaluation.tables["dino_bare"].shape == (1, 2) and len(evaluation.pictures["bare"]) == 2
    likeness = encoders.embed_dino_images(photos)
    assert evaluation.mean("dino_bare") == pytest.approx(
        float((likeness[:1] @ likeness.T).mean()), abs=1e-5
    )
    assert {name for name in evaluation.tables if name not in without.tables} == {"dino_bare"}
    assert all(
        np.array_equal(table, evaluation.tables[name]) for name, table in without.tables.items()
    )
    assert evaluation.score == without.score and evaluation.alarm == without.alarm
    swept = Evaluator(plan, encoders, photos).copy_subject_only()(draw)
    assert "dino_bare" not in swept.tables


def test_drift_sees_a_change_of_place(encoders, photos):
    """Use a DINO that sees nothing, as the real one sees no places."""
    blind = replace(encoders)
    blind.embed_clip_images, blind.embed_clip_texts = embed_pixels, make_equal_encoder(192)
    blind.embed_dino_images = make_equal_encoder(4)
    assert Evaluator(PLAN, blind, photos)(make_fixed_generator(photos[0])).mean("drift") > 0.01


def test_copies_of_photos_raise_the_alarm_and_lower_the_score(encoders, photos):
    pixel_encoders = replace(encoders)
    pixel_encoders.embed_clip_images = pixel_encoders.embed_dino_images = embed_pixels
    pixel_encoders.embed_clip_texts = make_equal_encoder(192)
    fresh, copies = (
        Evaluator(PLAN, pixel_encoders, photos)(draw)
        for draw in (make_stub_pictures, make_fixed_generator(*photos))
    )
    assert copies.alarm.raised and copies.alarm.share == 1 and copies.score == 0
    assert copies.mean("copy_index") == pytest.approx(1, abs=1e-3)
    assert not fresh.alarm.raised


def test_only_toy_photos_in_known_places_have_a_truth(encoders, tmp_path):
    assert find_truth(tmp_path, encoders) is None
    assert find_truth(write_subject(tmp_path), encoders).toy == TOY
    assert find_place("a photo of a {} on a checkered floor") == "on a checkered floor"
    elsewhere = replace(PLAN, templates=("a {} wearing a santa hat",))
    assert load_truth("toy", tmp_path, PLAN, encoders, 64).toy == TOY
    for base, folder, plan in (
        ("some/base", tmp_path, PLAN),
        ("toy", tmp_path, elsewhere),
        ("toy", None, PLAN),
    ):
        assert load_truth(base, folder, plan, encoders, 64) is None


def test_masks_give_the_background_alone_and_a_leak(encoders, photos):
    mask = Image.new("L", photos[0].size, 0)
    mask.paste(255, (10, 10, 30, 30))
    alone = np.array(mask_subject(photos[0], mask))
    assert (alone[15:25, 15:25] == 128).all() and (
        alone[40:, 40:] == np.array(photos[0])[40:, 40:]
    ).all()
    leaked = Evaluator(PLAN, encoders, photos, [mask, None, None])(
        make_fixed_generator(mask_subject(photos[0], mask))
    )
    assert leaked.mean("background_leak") > 0


@pytest.mark.slow
def test_true_renders_reach_the_ceiling_and_others_the_floor(tmp_path, photos):
    """Use an encoder that sees colour (mean RGB), which tells two toys of a kind apart."""
    encoders = tiny_encoders(tmp_path / "encoders")
    encoders.embed_dino_images = embed_mean_colours
    truth = find_truth(write_subject(tmp_path), encoders, size_px=64)
    places = [find_place(template) for template in PLAN.templates]
    image_places = [p for p in places for _ in PLAN.seeds]
    true, other_toys = (
        toy_pictures(toy, image_places, seed=1)
        for toy in (TOY, sample_other_toy(TOY, random.Random(3)))
    )
    soft = [picture.filter(ImageFilter.BoxBlur(2)) for picture in true]
    photo_vectors = embed_mean_colours(photos)
    good, bad, blurred = (
        truth.compute_tables(PLAN, images, embed_mean_colours(images), photo_vectors)
        for images in (true, other_toys, soft)
    )
    near, far, ceiling = good["truth"].mean(), bad["truth"].mean(), good["truth_ceiling"].mean()
    assert (
        near > far
        and ceiling > good["truth_floor"].mean()
        and abs(near - ceiling) < abs(far - ceiling)
    )
    renders = Image.fromarray(
        render([sample_view(random.Random(f"true {places[1]} {TOY}"), TOY, places[1])], 64)[
            0
        ].numpy()
    )
    fidelity = encoders.embed_clip_images([renders]) @ encoders.embed_clip_texts(PLAN.texts).T
    assert good["clip_t_ceiling"][1, 0] == pytest.approx(float(fidelity[0, 1]), abs=1e-5)
    assert {f"judge_{name}{end}" for name in QUESTIONS for end in ("", "_ceiling")} <= good.keys()
    assert good["judge_kind_ceiling"].shape == (3, 3)
    assert good["toy_sharpness"].mean() > max(
        good["toy_sharpness_ceiling"].mean(), 1.5 * blurred["toy_sharpness"].mean()
    )


def test_the_judge_compares_looks_and_places(encoders, tmp_path):
    truth = find_truth(write_subject(tmp_path), encoders, size_px=64)
    first = Reading("duck", "pink", "blue", "on the beach", frozenset({"top hat"}), (1.0,) * 5)
    wrong = replace(first, colour2="red", ornaments=frozenset({"top hat", "bow"}))
    truth.judge = SimpleNamespace(read=lambda images: [first, wrong, first, first, first, first])
    pictures = [Image.new("RGB", (64, 64))] * 6
    tables = truth._check_answers(
        [find_place(t) for t in PLAN.templates], stack_images(pictures), len(PLAN.seeds)
    )
    assert (
        tables["judge_ornaments"].tolist()
        == tables["judge_colour2"].tolist()
        == [[1, 0], [1, 1], [1, 1]]
    )
    assert tables["judge_place"].tolist() == [[1, 1], [0, 0], [0, 0]] and tables["judge_kind"].all()


def embed_pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """Return unit vectors of the images at 8 x 8, which tell a copy from any other image."""
    small = [
        torch.from_numpy(np.array(p.resize((8, 8)), dtype=np.float32)).flatten() - 128
        for p in pictures
    ]
    return normalize(torch.stack(small), dim=-1)


def make_equal_encoder(width: int):
    """Return an encoder whose vectors are all equal, of this length."""
    return lambda items: normalize(torch.ones(len(items), width), dim=-1)


def embed_mean_colours(pictures: list[Image.Image]) -> torch.Tensor:
    """Return unit vectors of the middle's mean colour, shifted so that colours differ in
    direction."""
    middles = [
        torch.from_numpy(np.array(p)[16:48, 16:48].astype(np.float32)).mean((0, 1)) - 128
        for p in pictures
    ]
    return normalize(torch.stack(middles), dim=-1)


ABOUT = report.ReportContext("mine", "toy", ("clip", "dino"), 2, 7.0)
SMILE = Metric(
    "Smile",
    base="smile_base",
    help="does it smile?",
    phrase="smiles in the images",
    logged=True,
    curve="smiles",
)


OF_SOME = {
    "identity",
    "identity_of_photos",
    "identity_share",
    "leak",
    "leak_base",
    "no_face",
    "identity_base",
    "no_face_base",
    "style",
    "dino_bare",
    "background_leak",
    "confusion",
    "confusion_base",
    "truth",
    "dino_of_ceiling",
    "clip_t_of_ceiling",
    "sharpness_of_ceiling",
}
"""Measures of only some evaluations: with a bare prompt, masks, several subjects or toys."""


def test_every_measure_is_computed_by_its_name(encoders, photos):
    scores = Evaluator(PLAN, encoders, photos)(make_stub_pictures).summarize_scores()
    assert METRICS.keys() - scores.keys() == OF_SOME


STYLE = {"dino": 0.9, "style": 0.6, "leak": 0.5, "leak_base": 0.2}
PERSON = {
    "dino": 0.5,
    "identity": 0.4,
    "identity_of_photos": 0.8,
    "no_face": 0.5,
    "no_face_base": 0.2,
}


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        (STYLE, 0.6 * (1 - (0.5 - 0.2))),
        (STYLE | {"leak": 0.1}, 0.6),  # less than the base's is no gain
        (STYLE | {"style": 1.7}, 1 - (0.5 - 0.2)),
        (PERSON, (0.5 + 0.4 / 0.8 * (1 - 0.5) / (1 - 0.2)) / 2),
        (PERSON | {"identity": 0.9, "no_face": 0.0}, (0.5 + 1) / 2),
        ({"dino": 0.5}, 0.5),
    ],
)
def test_the_likeness_of_styles_and_persons(means, expected):
    tables = {name: np.array([mean - 0.05, mean + 0.05]) for name, mean in means.items()}
    assert compute_fidelity(tables) == pytest.approx(expected)


def test_the_truth_overwrites_no_other_table(encoders, photos):
    truth = SimpleNamespace(
        compute_tables=lambda *_: {"dino": np.ones((3, 2)), "truth": np.ones((3, 2))}
    )
    with pytest.raises(ValueError, match=r"tables of the same name: \['dino'\]"):
        Evaluator(PLAN, encoders, photos, truth=truth)(make_stub_pictures)


def test_a_measure_needs_only_a_row_of_the_table(encoders, photos, monkeypatch):
    """Check also that the scale or base of every measure names an existing table."""
    table_names = {*METRICS, "clip_i_base", "diversity_base", "toy_sharpness"}
    table_names |= {f"{name}_ceiling" for name in ("dino", "clip_t", "toy_sharpness")}
    assert {
        name for row in METRICS.values() for name in (row.base, *(row.share or ())) if name
    } <= table_names
    like_base = Metric(
        "Smile, share of the base's", "share", share=("smile", "smile_base"), logged=True
    )
    monkeypatch.setitem(METRICS, "smile", SMILE)
    monkeypatch.setitem(METRICS, "smile_of_base", like_base)
    evaluation = Evaluator(PLAN, encoders, photos)(make_stub_pictures)
    evaluation.tables |= {"smile": np.full((3, 2), 0.625), "smile_base": np.full((3, 2), 0.5)}
    context = replace(ABOUT, adapter_scale=0.5)
    html = report.render_report(evaluation, context, photos)
    assert (
        "adapter scale 0.5" in html
        and report.build_scores_json(evaluation, context)["protocol"]["adapter_scale"] == 0.5
    )
    for text in (
        "Smile",
        "0.625 [0.625, 0.625]",
        "0.500 [0.500, 0.500]",
        "does it smile?",
        "1.250",
    ):
        assert f">{text}<" in html
    summary = format_summary(evaluation)
    assert "smiles in the images 62% (62% to 62%); the base's images 50%" in summary.splitlines()
    assert all(line[0].isalpha() and "_" not in line for line in summary.splitlines())
    scores = evaluation.list_logged_scores()
    assert (scores["smile"], scores["smile_of_base"]) == (0.625, 1.25)
    event = {
        "type": StepEvaluated.kind,
        "step": 3,
        "best": {"step": 3, "score": 0.1, "since": 0},
        **scores,
    }
    axes = Figure().subplots()
    run_plots.plot_scores(axes, [parse_record(event)])
    assert "smiles" in axes.get_legend_handles_labels()[1]
    assert "| smile | 0.625 |" in model_card.format_score_table(
        SimpleNamespace(scores=parse_record(event).scores, best=None)
    )


@pytest.fixture(scope="module")
def subject_photos():
    places = ["on grass", "on the beach", "in a kitchen"]
    return {"duck": toy_pictures(TOY, places), "rocket": toy_pictures(ROCKET, places)}


@pytest.fixture(scope="module")
def evaluators(subject_photos):
    encoders = load_encoders("toy")  # random ones see no difference
    plans = {
        word: replace(PLAN, subject=SubjectWords("sks", word), unrelated=("a photo of a red car",))
        for word in subject_photos
    }
    duck, rocket = (
        Evaluator(plans[word], encoders, subject_photos[word]) for word in ("duck", "rocket")
    )
    duck.rivals, rocket.rivals = [rocket.photos.dino], [duck.photos.dino]
    return [duck, rocket]


def make_generator(subject_photos, swapped=False):
    """Return a generator of photos of the prompted subject, or swapped; the base returns noise."""
    kinds = {
        "sks duck": "rocket" if swapped else "duck",
        "sks rocket": "duck" if swapped else "rocket",
    }

    def draw(requests, with_adapter):
        if not with_adapter:
            return make_stub_pictures(requests)
        matches = [next((w for w in kinds if w in request.prompt), None) for request in requests]
        return [
            subject_photos[kinds[word]][n % 3] if word else make_stub_pictures([requests[n]])[0]
            for n, word in enumerate(matches)
        ]

    return draw


@pytest.fixture(scope="module")
def evaluations(evaluators, subject_photos):
    """Return the evaluations of an adapter that follows its prompts."""
    return [evaluator(make_generator(subject_photos)) for evaluator in evaluators]


def test_confusion_follows_its_definition():
    draws = torch.Generator().manual_seed(0)
    own_photos, other_photos, images = (
        normalize(torch.randn(n, 8, generator=draws), dim=1) for n in (3, 4, 5)
    )

    def leave_out(photos, number):
        return torch.cat([photos[:number], photos[number + 1 :]])

    def compute_margin(image, photos, rivals):
        return float((photos @ image).mean() - (rivals @ image).mean())

    at_own = np.mean(
        [
            compute_margin(photo, leave_out(own_photos, n), other_photos)
            for n, photo in enumerate(own_photos)
        ]
    )
    at_other = np.mean(
        [
            compute_margin(photo, own_photos, leave_out(other_photos, n))
            for n, photo in enumerate(other_photos)
        ]
    )
    expected = [
        (at_own - compute_margin(picture, own_photos, other_photos)) / (at_own - at_other)
        for picture in images
    ]
    assert metrics.confusion(images, own_photos, other_photos).tolist() == pytest.approx(
        expected, abs=1e-5
    )
    assert torch.isfinite(metrics.confusion(own_photos, own_photos, own_photos)).all()
    assert torch.isfinite(metrics.confusion(own_photos, own_photos[:1], other_photos[:1])).all()


def test_swapped_subjects_are_confused_and_merge_by_prompt(evaluators, subject_photos, evaluations):
    wrong = [evaluator(make_generator(subject_photos, swapped=True)) for evaluator in evaluators]
    for good, bad in zip(evaluations, wrong, strict=True):
        assert good.tables["confusion"].shape == (3, 2)
        assert good.mean("confusion") < 0.05 and bad.mean("confusion") > 0.95
        assert good.mean("dino") > bad.mean("dino")
    whole = report.merge_evaluations(evaluations)
    assert whole.tables["dino"].shape == (6, 2) and whole.tables["pres"].shape == (4,)
    assert whole.mean("dino") == pytest.approx(np.mean([each.mean("dino") for each in evaluations]))
    assert (
        whole.score == pytest.approx(np.mean([each.score for each in evaluations]))
        and whole.alarm.raised
    )
    assert (
        not any("sks" in name for name in whole.tables) and "confusion" in whole.summarize_scores()
    )
    assert report.merge_evaluations(evaluations[:1]) is evaluations[0]


def test_each_subject_has_a_report_and_all_have_scores(evaluators, evaluations, tmp_path):
    report.write_reports(tmp_path, evaluators, evaluations, BOTH)
    scores = json.loads((tmp_path / "scores.json").read_text())
    duck_scores = scores["subjects"][0]["scores"]
    confused, base_confusion = (duck_scores[f"confusion{end}"] for end in ("", "_base"))
    assert confused["low"] <= confused["mean"] < 0.05 < base_confusion["mean"]
    assert [entry["subject"]["class_word"] for entry in scores["subjects"]] == ["duck", "rocket"]
    assert "Confusion" in (tmp_path / "subject_2" / "report.html").read_text()


@pytest.fixture
def mixed_photos(subject_photos, tmp_path):
    """Return the configuration and the photos of a folder of three ducks and a rocket."""
    for number, picture in enumerate([*subject_photos["duck"], subject_photos["rocket"][0]]):
        picture.save(tmp_path / f"{number}.png")
    config = TrainConfig(
        pretrained_model_name_or_path="toy",
        instance_data_dir=str(tmp_path),
        instance_prompt="a photo of a sks duck",
        resolution=64,
    )
    photos = build_photo_report(config).photos
    return config, photos


def test_a_photo_of_something_else_is_named_by_explain(mixed_photos):
    config, photos = mixed_photos
    (evaluator,) = report.build_evaluators([config], photos, [PLAN], load_encoders("toy"), 128)
    evaluation = evaluator(lambda requests, with_adapter: make_stub_pictures(requests))
    likeness = report.build_scores_json(evaluation, BOTH)["dino_of_each_photo"]
    assert list(likeness) == ["0.png", "1.png", "2.png", "3.png"]
    assert np.mean(list(likeness.values())) == pytest.approx(evaluation.photo_fidelity, abs=1e-3)
    *_, sentence = list_advice(RunMetrics(config, photo_likeness=likeness))
    assert sentence.startswith("3.png may show") and sentence.endswith("--leave_out 3.png")


def test_synthetic_photos_count_only_if_no_photo_is_real(mixed_photos):
    config, photos = mixed_photos
    encoders = load_encoders("toy")
    synthetic = [replace(photo, made_by="a model") for photo in photos]
    for chosen_photos, names in (
        ([*photos[:1], *synthetic[1:]], ["0.png"]),
        (synthetic, ["0.png", "1.png", "2.png", "3.png"]),
    ):
        (evaluator,) = report.build_evaluators([config], chosen_photos, [PLAN], encoders, 128)
        assert evaluator.names == names and len(evaluator.photos.pictures) == len(names)
