"""The service and the fleet with bases of other families than SDXL: a UNet, packed latents, a plain
transformer."""

import asyncio
import json
from dataclasses import replace

import pytest

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.extras.cluster.fleet import PROCESS_GIB, Machines, build_tasks
from dreambooth_moslora.extras.cluster.fleet_subjects import Subject
from dreambooth_moslora.extras.serving.catalogue import open_catalogue, parse_order
from dreambooth_moslora.extras.serving.drawer import ImageWorker
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.plan.plan import make_plan
from dreambooth_moslora.settings import field_facts
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_families import tiny_pipeline
from tests.helpers.tiny_training import paint_photos, tiny_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["sd1", "flux", "z_image"])
def config(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny_pipeline(request.param, folder / "files").save_pretrained(folder / "base")
    options = {"target_modules": field_facts.ATTENTION_LAYERS, "max_train_steps": 1}
    return tiny_config(
        folder / "base", paint_photos(folder / "photos"), folder / "runs" / "dog", **options
    )


def test_the_service_draws_the_very_picture_of_generate(config, tmp_path, monkeypatch):
    base, run = config.pretrained_model_name_or_path, config.output_dir
    train(config)
    monkeypatch.chdir(tmp_path)
    size = ["--width", "64", "--height", "64", "--steps", "2", "--seed", "3", "--output_dir", "."]
    assert (
        main(
            ["generate", "--base", base, "--adapter", run, "--prompt", "a photo of sks dog", *size]
        )
        == 0
    )
    catalogue = open_catalogue([f"{run}/.."])
    body = {
        "prompt": "a photo of sks dog",
        "adapter": "dog",
        "seed": 3,
        "steps": 2,
        "height_px": 64,
        "width_px": 64,
    }
    order = replace(parse_order(json.dumps(body).encode()), adapters=(catalogue.find("dog"),))
    image = asyncio.run(ImageWorker(SubjectPipeline.from_base(base)).draw(order))
    assert image == (tmp_path / "image_3.png").read_bytes()


def test_a_fleet_asks_for_the_memory_of_the_plan(config, tmp_path):
    subject = Subject("dog", config.to_dict())
    (task,) = build_tasks([(subject, "mark")], tmp_path, Machines(None, 99.0), pytest.fail)
    needed = make_plan(config).cost.peak_gib
    assert task.resources.memory_gib == pytest.approx(needed + PROCESS_GIB, abs=1e-9)
