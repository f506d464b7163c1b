"""The plan of a run: made once, its steps against numbers worked out by hand, and what is
advised."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.cli.command_train import train_main
from dreambooth_moslora.lora.metadata import DORA_NOTE, TRANSFORMER_DORA_NOTE
from dreambooth_moslora.photos import folder, photo_file
from dreambooth_moslora.plan import memory, plan
from dreambooth_moslora.plan.base_size import BaseSize
from dreambooth_moslora.plan.memory import estimate_memory
from dreambooth_moslora.plan.plan import RunPlan, make_plan
from dreambooth_moslora.plan.steps import plan_steps
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training.dry_run import list_plan_advice
from tests.helpers.few_pictures import few_pictures
from tests.helpers.odd_photos import picture
from tests.helpers.tiny_training import paint_photos


def test_scored_run_makes_one_plan_and_opens_each_photo_once(
    tiny_base, encoders, tmp_path, monkeypatch
):
    """Encoding and scoring open them for their pixels, by `photo.open_rgb`."""
    opened, plans = Counter(), []
    open_image, mask_problem = photo_file.open_image, photo_file.explain_unusable_mask
    counting = lambda path, *sizes: opened.update([path.name]) or open_image(path, *sizes)  # noqa: E731
    monkeypatch.setattr(
        folder, "photo_file", SimpleNamespace(**vars(photo_file) | {"open_image": counting})
    )
    counted = lambda path, size: opened.update([path.name]) or mask_problem(path, size)  # noqa: E731
    monkeypatch.setattr(photo_file, "explain_unusable_mask", counted)
    counted = lambda *settings: plans.append(settings) or memory.estimate_memory(*settings)  # noqa: E731
    monkeypatch.setattr(
        plan, "memory", SimpleNamespace(**vars(memory) | {"estimate_memory": counted})
    )
    monkeypatch.setattr(
        "dreambooth_moslora.evaluation.metrics.load_encoders", lambda name, **_: encoders
    )
    photos = paint_photos(tmp_path / "photos")
    flags = [
        "--pretrained_model_name_or_path",
        str(tiny_base),
        "--resolution",
        "64",
        "--report_to",
        "none",
    ]
    flags += [
        "--max_train_steps",
        "1",
        "--evaluate_steps",
        "1",
        "--num_validation_images",
        "0",
    ]
    with few_pictures(inference_steps=1):
        assert train_main([str(photos), "dog", *flags, "--output_dir", str(tmp_path / "dog")]) == 0
    assert opened == {path.name: 1 for path in photos.iterdir()} and len(plans) == 1
    assert "evaluation" in (tmp_path / "dog" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("batch", "accumulation", "repeats", "prior", "processes", "steps"),
    [
        (4, 1, 1, False, 1, 2),  # 7 photos: 2 batches
        (2, 3, 5, True, 2, 4),  # 37 class images are more than 35 photos: 10 batches, 4 steps of 3
        (1, 4, 2, True, 1, 10),  # 37 class images: 37 batches, 10 steps of 4
        (1, 1, 6, True, 1, 42),  # 42 photos are more than 37 class images
    ],
)
def test_an_epoch_has_the_steps_that_diffusers_script_counts(
    batch, accumulation, repeats, prior, processes, steps
):
    sizes = {
        "train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "repeats": repeats,
    }
    classes = {"with_prior_preservation": prior, "class_prompt": "a dog", "num_class_images": 37}
    plan = plan_steps(TrainConfig(num_train_epochs=2, **sizes, **classes), 7, processes)
    assert (plan.steps_per_epoch, plan.total_steps) == (steps, 2 * steps)


def test_exposures_a_photo_set_the_steps():
    """50 × 7 photos, 1, 4 and 12 a step."""
    for batch, accumulation, processes, steps in ((1, 1, 1, 350), (4, 1, 1, 88), (2, 3, 2, 30)):
        sizes = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        plan = plan_steps(TrainConfig(exposures_per_photo=50, **sizes), 7, processes)
        assert (
            plan.total_steps == steps
            and 50 <= plan.exposures_per_photo < 50 + plan.photos_per_step / 7
        )


def advised(topic: str = "each photo is seen", **settings) -> list[str]:
    config = TrainConfig(**settings)
    plan = RunPlan(
        config=config,
        base=Base.of(config),
        photo_report=folder.PhotoReport([], []),
        steps=plan_steps(config, 5),
        cost=estimate_memory(config, BaseSize(), 1),
    )
    return [line for line in list_plan_advice(plan) if topic in line]


def test_few_exposures_and_endless_warm_up_are_remarked_on():
    """The default warm-up, as in diffusers' script, is longer than most runs of a subject."""
    (line,) = advised()
    assert "about 2 times" in line and "--exposures_per_photo" in line
    assert advised(exposures_per_photo=99, train_batch_size=1)
    assert advised(exposures_per_photo=100) == []
    cosine = {"topic": "--lr_warmup_steps", "lr_scheduler": "cosine"}
    assert advised(**cosine, max_train_steps=400) == [
        "the learning rate rises for 500 steps, and the run has 400: set --lr_warmup_steps"
    ]
    assert not advised(**cosine, max_train_steps=501)
    assert not advised(**cosine | {"lr_scheduler": "constant"}, max_train_steps=400)


def test_dora_run_is_warned_about_other_programs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture().save("0.png")
    config = TrainConfig(instance_data_dir=".", resolution=64, use_dora=True)
    assert DORA_NOTE in list_plan_advice(make_plan(config))
    assert DORA_NOTE not in list_plan_advice(make_plan(replace(config, use_dora=False)))
    assert "AUTOMATIC1111, InvokeAI: another adapter" in DORA_NOTE
    of_transformer = replace(config, pretrained_model_name_or_path="toy-zimage")
    assert {DORA_NOTE, TRANSFORMER_DORA_NOTE} & {*list_plan_advice(make_plan(of_transformer))} == {
        TRANSFORMER_DORA_NOTE
    }
