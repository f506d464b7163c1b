"""A velocity base with zero terminal SNR: it draws from pure noise, and its contrast is held (Lin et al. 2024)."""

import json

import numpy as np
import pytest
from diffusers import StableDiffusionXLPipeline

from dreambooth_moslora.base.load import guidance_rescale, load_pipeline
from dreambooth_moslora.generation.fixed_seeds import generate_images
from dreambooth_moslora.generation.params import SCHEDULERS, GenerationParams, Image
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from tests.helpers.tiny import save_tiny_sdxl

PARAMS = GenerationParams("a photo of a sks dog", seed=3, steps=2, guidance_scale=9.0)


@pytest.fixture(scope="module")
def zero_snr_base(tmp_path_factory):
    """As its authors publish it: marked, and with SDXL's own spacing of timesteps."""
    folder = save_tiny_sdxl(tmp_path_factory.mktemp("base"), prediction_type="v_prediction")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    return folder


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_starts_at_pure_noise(zero_snr_base, name):
    scheduler = SubjectPipeline(load_pipeline(zero_snr_base), "tiny")._scheduler(name)
    scheduler.set_timesteps(10)
    assert int(scheduler.timesteps[0]) == 999


def test_the_rescaling_of_guidance_reaches_every_picture(zero_snr_base, monkeypatch):
    asked = []
    call = StableDiffusionXLPipeline.__call__

    def noted(self, *arguments, **options):
        asked.append(options.get("guidance_rescale"))
        return call(self, *arguments, num_inference_steps=options.pop("num_inference_steps", 2), **options)

    monkeypatch.setattr(StableDiffusionXLPipeline, "__call__", noted)
    pipeline = load_pipeline(zero_snr_base)
    pipeline.set_progress_bar_config(disable=True)
    [*_, event] = SubjectPipeline(pipeline, "tiny").generate(PARAMS)
    [drawn] = generate_images(pipeline, "a dog", [1], (64, 64))
    assert asked == [0.7, 0.7]
    assert isinstance(event, Image) and np.asarray(event.pixels).std() > 0 and np.asarray(drawn).std() > 0


def test_other_bases_are_drawn_as_before(tiny_base, tmp_path):
    velocity = save_tiny_sdxl(tmp_path / "v", prediction_type="v_prediction")
    for folder in (tiny_base, velocity):
        pipeline = load_pipeline(folder)
        assert guidance_rescale(pipeline) == 0.0
        assert pipeline.scheduler.config.timestep_spacing == "leading"
