"""Editing models as bases: trained and drawn without a reference image, as text-to-image models."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth_moslora.base import load
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.families import build_family
from dreambooth_moslora.generation.image_params import GenerationParams
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.plan.base_size import find_base_size
from dreambooth_moslora.settings.family_facts import FAMILIES
from dreambooth_moslora.training.loop import train
from tests.base.test_families import relative, steps_of_both
from tests.helpers.tiny_families import tiny_pipeline
from tests.helpers.tiny_training import paint_photos, tiny_config

PX = 64
PROMPTS = ["a photo of sks dog", "a photo of sks cat"]


class SmallKontext(diffusers.FluxKontextPipeline):
    """FLUX.1 Kontext, which otherwise draws a square megapixel whatever size is asked for."""

    def __call__(self, *args, **options):
        return super().__call__(*args, max_area=PX * PX, **options)


def save_editing_base(family: str, kind: str, folder: Path) -> Path:
    """Save a tiny base of the family with an editing pipeline's index."""
    pipeline = tiny_pipeline(family, folder / "files")
    if family == "qwen_image":
        pipeline.transformer.register_to_config(zero_cond_t=True)  # as Qwen-Image-Edit-2511
    pipeline.save_pretrained(folder / "base")
    index = folder / "base" / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8")) | {"_class_name": kind}
    if family == "qwen_image":
        content["processor"] = ["transformers", "Qwen2VLProcessor"]
    index.write_text(json.dumps(content), encoding="utf-8")
    return folder / "base"


EDITING = [(facts, kind) for facts in FAMILIES for kind in facts.editing_pipelines]


@pytest.mark.parametrize(("facts", "kind"), EDITING, ids=[kind for _, kind in EDITING])
def test_an_editing_model_is_loaded_as_its_familys_pipeline(facts, kind, tmp_path):
    base = save_editing_base(facts.name, kind, tmp_path)
    assert Base.find(base).facts is facts and hasattr(diffusers, kind)
    assert type(load.load_pipeline(base)).__name__ == facts.pipeline


@torch.no_grad()
def test_kontext_predicts_as_its_own_pipeline_without_an_image(tmp_path):
    parts = load.load_pipeline(
        save_editing_base("flux", "FluxKontextPipeline", tmp_path)
    ).components
    pipeline = SmallKontext(**parts)
    family = build_family(diffusers.FluxPipeline(**parts), embedded_guidance=3.5)
    pipeline.set_progress_bar_config(disable=True)
    ours, theirs, _ = steps_of_both(pipeline, family, PROMPTS)
    assert relative(ours, theirs) < 2e-6


@torch.no_grad()
def test_the_newest_qwen_image_edit_predicts_as_the_pipeline(tmp_path):
    """Its transformer modulates a reference's tokens by another timestep; there are none."""
    base = save_editing_base("qwen_image", "QwenImageEditPlusPipeline", tmp_path)
    pipeline = load.load_pipeline(base)
    assert pipeline.transformer.zero_cond_t
    ours, theirs, _ = steps_of_both(pipeline, build_family(pipeline), PROMPTS)
    assert relative(ours, theirs) < 2e-6


@pytest.mark.parametrize("hub_id", [name for facts in FAMILIES for name in facts.editing_models])
def test_a_published_editing_model_is_planned_offline(hub_id):
    size = find_base_size(Base.find(hub_id), ())
    assert hub_id in (size.hub_id, *size.family.editing_models) and not size.is_assumed
    assert size.unet == size.family.models[0].parameters


def test_kontext_learns_a_subject_and_its_own_pipeline_edits_with_the_file(tmp_path):
    base = save_editing_base("flux", "FluxKontextPipeline", tmp_path)
    settings = {"max_train_steps": 2, "learning_rate": 0.1, "num_validation_images": 1}
    config = tiny_config(base, paint_photos(tmp_path / "photos"), tmp_path / "run", **settings)
    train(config)

    # Without an image, our drawing is that of the stock pipeline.
    stock = SmallKontext.from_pretrained(base)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(tmp_path / "run"))
    options = {"height": PX, "width": PX, "num_inference_steps": 2, "guidance_scale": 3.5}

    def draw(**more) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return stock(
            prompt=PROMPTS[0], generator=generator, output_type="pt", **options, **more
        ).images[0]

    subject = SubjectPipeline.from_base(base)
    name = subject.load_adapter(tmp_path / "run")
    size = {"height_px": PX, "width_px": PX}
    (image,) = subject.draw(GenerationParams(PROMPTS[0], steps=2, adapters=name, **size))
    pixels = torch.from_numpy(np.array(image.pixels)).permute(2, 0, 1) / 255
    assert (pixels - draw()).abs().max() < 0.01

    # With an image, the adapter changes what is drawn.
    photo = Image.new("RGB", (PX, PX), "red")
    edited = draw(image=photo, _auto_resize=False)
    stock.disable_lora()
    assert not torch.equal(edited, draw(image=photo, _auto_resize=False))
