"""The second embedded base is an ordinary Z-Image pipeline, and it is trained, drawn and scored as
the first one is."""

import json

import pytest
from diffusers import ZImagePipeline

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.paths import get_assets_folder
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.settings import toy_bases
from dreambooth_moslora.settings.family_facts import get_facts
from toybox.captions import format_canonical_caption
from toybox.measures.evaluate_base import generate, measure_accuracy, sample_scenes

FOLDER = get_assets_folder() / "toy-zimage"


def test_name_and_folder_load_it_with_the_shared_autoencoder():
    assert Base.find("toy-zimage").folder == FOLDER
    for name in ("toy-zimage", str(FOLDER)):
        assert Base.find(name).guidance == 1.5 + get_facts("ZImagePipeline").no_guidance
        assert (base := Base.find(name)).is_toy and (base.resolution_px, base.facts.name) == (
            toy_bases.RESOLUTION_PX,
            "z_image",
        )
    assert not toy_bases.is_toy("somebody/toy")
    weights = [
        folder / "vae" / "diffusion_pytorch_model.safetensors"
        for folder in (FOLDER, toy_bases.CLIP_FOLDER)
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_the_judge_finds_in_its_pictures_what_the_prompts_name():
    pipeline = ZImagePipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    scenes = sample_scenes(20, held_out=False, seed=70_000)
    right = measure_accuracy(
        generate(pipeline, [format_canonical_caption(scene) for scene in scenes], seed=70_000),
        scenes,
    )
    assert right["kind"] >= 0.8 and right["colour"] >= 0.7 and right["place"] >= 0.7


@pytest.mark.slow
def test_photos_become_a_file_that_draws_and_is_scored(
    tmp_path,
):
    run = tmp_path / "run"
    arguments = [
        "--max_train_steps=2",
        "--validation_steps=2",
        "--num_validation_images=1",
        "--output_dir",
        str(run),
    ]
    assert main(["train", "--config", "assets/configs/toy_zimage.toml", *arguments]) == 0
    assert ", height=128, width=128).images[0]" in (run / "README.md").read_text(encoding="utf-8")
    pipeline = SubjectPipeline.from_base("toy-zimage")
    pipeline.load_adapter(run)
    assert pipeline.resolution_px == toy_bases.RESOLUTION_PX
    assert (
        main(
            [
                "evaluate",
                str(run),
                "--num_prompts=1",
                "--images_per_prompt=1",
                "--inference_steps=2",
            ]
        )
        == 0
    )
    table = json.loads((run / "evaluation" / "scores.json").read_text(encoding="utf-8"))
    assert "toy-sdxl CLIP" in json.dumps(table)
