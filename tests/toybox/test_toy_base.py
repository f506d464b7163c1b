"""The embedded base is an ordinary SDXL pipeline: diffusers loads it, draws and edits without our
code."""

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image as Picture
from safetensors import safe_open
from transformers import CLIPTokenizer, Dinov2Model

from dreambooth_moslora.base.load import SDXL_FAMILY
from dreambooth_moslora.generation.image_params import GenerationParams, Image
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.generation.sampling import Sampler, SampleRequest
from toybox.captions import format_canonical_caption
from toybox.learning.train_unet import build_noise_schedule
from toybox.learning.train_vit import build_vit
from toybox.make_subjects import load, sample_photo_scenes
from toybox.measures import evaluate_parts as parts
from toybox.measures.evaluate_base import generate, measure_accuracy, sample_scenes
from toybox.render import render

ASSETS = Path(__file__).parents[2] / "assets"
LIMIT_MIB = 64
PROMPT = "a photo of a red robot on the beach"


@pytest.fixture(scope="module")
def base() -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(ASSETS / "toy-sdxl")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, seed: int = 3, **arguments) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return pipeline(
        PROMPT, num_inference_steps=4, generator=generator, output_type="np", **arguments
    ).images[0]


def test_it_draws_128_px_and_the_same_from_the_same_seed(base):
    first = drawn(base)
    assert first.shape == (128, 128, 3) and first.std() > 0.05
    assert np.array_equal(first, drawn(base)) and not np.array_equal(first, drawn(base, seed=4))


@pytest.mark.slow
def test_it_is_drawn_at_its_guidance_unless_one_is_set(base):
    subject = SubjectPipeline.from_base("toy")
    params = GenerationParams(PROMPT, seed=3, steps=4)
    (ours,) = (event for event in subject.generate(params) if isinstance(event, Image))
    assert ours.params.guidance_scale == 2.5
    assert np.abs(np.asarray(ours.pixels) / 255 - drawn(base, guidance_scale=2.5)).max() < 0.02
    assert subject.complete(replace(params, guidance_scale=6.0)).guidance_scale == 6.0
    encode = partial(SDXL_FAMILY.encode_prompts, subject.pipeline)
    for scale in (6.0, subject.guidance_scale):
        sampler = Sampler(subject.pipeline, encode, 128, torch.device("cpu"), scale, 4)
        (sample,) = sampler([SampleRequest(PROMPT, 3)])
        assert np.abs(np.asarray(sample) / 255 - drawn(base, guidance_scale=scale)).max() < 0.02


def test_its_topology_is_sdxls_and_its_schedule_the_trained_one(base):
    config = base.unet.config
    assert config.down_block_types == [
        "DownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
    ]
    assert config.addition_embed_type == "text_time" and config.use_linear_projection
    widths = base.text_encoder.config.hidden_size, base.text_encoder_2.config.hidden_size
    assert widths[0] != widths[1] and sum(widths) == config.cross_attention_dim
    assert base.vae_scale_factor == 8 and base.vae.config.latent_channels == 4
    trained = build_noise_schedule().config
    for name in (
        "prediction_type",
        "beta_schedule",
        "beta_start",
        "beta_end",
        "num_train_timesteps",
    ):
        assert base.scheduler.config[name] == trained[name], name
    assert trained["prediction_type"] == "v_prediction"


@pytest.mark.slow
def test_the_judge_finds_in_its_pictures_what_the_prompts_name(base):
    scenes = sample_scenes(20, held_out=False, seed=70_000)
    right = measure_accuracy(
        generate(base, [format_canonical_caption(scene) for scene in scenes], seed=70_000), scenes
    )
    assert right["kind"] >= 0.8 and right["colour"] >= 0.7 and right["place"] >= 0.9


@pytest.mark.slow
def test_its_vit_tells_individuals_apart():
    toys = parts.sample_unlike_toys("duck", 50)
    assert len({replace(toy, genes=()) for toy in toys}) == 50 and {toy.kind for toy in toys} == {
        "duck"
    }
    trained = Dinov2Model.from_pretrained(ASSETS / "toy-dino", torch_dtype=torch.float32).eval()
    shares = [
        parts.measure_individuals(vit, "duck", count=12) for vit in (trained, build_vit().eval())
    ]
    assert shares[0] > 0.9 and shares[1] < 0.5


@pytest.mark.slow
def test_its_vae_keeps_renders_and_its_clip_knows_their_captions(base):
    images, captions = parts.render_fresh(100, seed=1)
    assert parts.compute_psnr_db(images, parts.encode_and_decode(base.vae, images)).mean() > 29
    assert parts.measure_retrieval(base, images, captions) > 0.8


def test_any_prompt_and_a_rare_token_are_accepted(base):
    ids = base.tokenizer(["a photo of sks duck, naïve 日本 🦆"]).input_ids[0]
    assert base.tokenizer.unk_token_id not in ids[1:-1] and len(ids) < 77
    assert "sks" in base.tokenizer.decode(ids, skip_special_tokens=True)


def test_img2img_and_inpaint_take_its_parts(base):
    subject = load("duck")
    photo = Picture.fromarray(render(sample_photo_scenes(subject)[:1], 128)[0].numpy())
    edit = StableDiffusionXLImg2ImgPipeline.from_pipe(base)
    mask = Picture.new("L", photo.size)
    mask.paste(255, (0, 0, 64, 128))
    paint = StableDiffusionXLInpaintPipeline.from_pipe(base)
    for pipeline, arguments in (
        (edit, {}),
        (paint, {"mask_image": mask, "height": 128, "width": 128}),
    ):
        pipeline.set_progress_bar_config(disable=True)
        image = drawn(pipeline, image=photo, strength=0.6, **arguments)
        assert image.shape == (128, 128, 3)
        assert 0.01 < np.abs(image - np.asarray(photo) / 255).mean() < 0.4


@pytest.mark.parametrize("end", ["", "_2"])
def test_transformers_4_reads_the_text_encoders_and_tokenizer(end):
    """It reads two files of the tokenizer, transformers 5 one."""
    with safe_open(
        ASSETS / "toy-sdxl" / f"text_encoder{end}" / "model.safetensors", "pt"
    ) as opened:
        assert all(key.startswith(("text_model.", "text_projection.")) for key in opened.keys())  # noqa: SIM118
    folder = ASSETS / "toy-sdxl" / f"tokenizer{end}"
    of_two = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    assert (
        of_two(PROMPT + ", naïve").input_ids
        == CLIPTokenizer.from_pretrained(folder)(PROMPT + ", naïve").input_ids
    )


def test_the_embedded_weights_stay_small_and_fp16():
    """The second base has the autoencoder of the first: git keeps equal files once."""
    files = sorted(ASSETS.glob("toy-*/**/*.safetensors"))
    sizes = {hashlib.sha256(f.read_bytes()).hexdigest(): f.stat().st_size for f in files}
    assert len(sizes) == len(files) - 1 and sum(sizes.values()) < LIMIT_MIB * 2**20
    for file in files:
        header = file.read_bytes()[:20_000]
        assert b'"dtype":"F16"' in header and b'"dtype":"F32"' not in header, file.name
