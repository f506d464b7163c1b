"""The second base of the toy world: its teacher's answers, and a run that resumes and ends with a
pipeline."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ZImagePipeline
from safetensors.torch import load_file
from transformers import Qwen2Tokenizer

from dreambooth_moslora.disk.paths import get_assets_folder
from toybox.data.renders import Renders
from toybox.keep_training import BASE, Settings, make_renders
from toybox.learning import train_flow
from toybox.learning.train_unet import build_noise_schedule, load_latents

pytestmark = pytest.mark.slow
PICTURES = 8


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("renders")
    make_renders(folder, Settings(shards=1, pictures=PICTURES), leg=0)
    return folder


def trained(state: Path, out: Path, *arguments: str) -> dict[str, torch.Tensor] | None:
    paths = ["--data", state / "toys", "--latents", state / "latents", "--out", out]
    train_flow.train(
        train_flow.parse([*map(str, paths), "--batch", "4", "--steps", "6", *arguments])
    )
    return load_file(out / "model" / "transformer" / "diffusion_pytorch_model.safetensors")


def test_the_teacher_predicts_better_with_the_caption(state):
    teacher, renders = train_flow.Teacher(BASE), Renders(state / "toys")
    x = load_latents(state / "latents")["latents"].float()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    captions = [row["canonical_caption"] for row in renders.rows]
    t = teacher.find_timesteps(torch.full((PICTURES,), 0.8))
    assert teacher.sigmas[t] == pytest.approx(0.8, abs=1e-3)
    z = torch.lerp(x, noise, teacher.sigmas[t][:, None, None, None])
    captioned, other_caption, empty = (
        float((teacher(z, t, texts) - (x - noise)).square().mean() / (x - noise).square().mean())
        for texts in (captions, captions[::-1], [""] * PICTURES)
    )
    assert captioned < 0.4 and captioned < empty < 1 and captioned < other_caption


def test_the_transformer_predicts_better_with_the_caption(state):
    teacher, renders = (
        train_flow.FlowTeacher(get_assets_folder() / "toy-zimage"),
        Renders(state / "toys"),
    )
    x = load_latents(state / "latents")["latents"].float()
    noise, schedule = (
        torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
        build_noise_schedule(),
    )
    t = torch.full((PICTURES,), 700)
    noisy, velocity = schedule.add_noise(x, noise, t), schedule.get_velocity(x, noise, t)
    captions = [row["canonical_caption"] for row in renders.rows]
    captioned, other_caption = (
        float((teacher(noisy, t, texts) - velocity).square().mean() / velocity.square().mean())
        for texts in (captions, captions[::-1])
    )
    # These latents, trained under noise, leave 0.43 of a velocity untold.
    assert captioned < 0.5 and captioned < other_caption


def test_a_resumed_run_has_equal_weights_that_diffusers_loads(state, tmp_path):
    """In fp32 a teacher that is loaded anew may round its answers otherwise."""
    folders = whole, half, parts = [tmp_path / name for name in ("whole", "half", "parts")]
    for out, *arguments in ((whole,), (half, "--until", "3"), (parts, "--until", "3"), (parts,)):
        trained(state, out, *arguments)
    end, early, resumed = (torch.load(out / "state.pt")["weights"]["masters"] for out in folders)
    apart = [sum((a - b).norm() for a, b in zip(end, weights)) for weights in (early, resumed)]
    assert apart[1] < 0.01 * apart[0]
    pipeline = ZImagePipeline.from_pretrained(tmp_path / "whole" / "model")
    prompts = ["a photo of a red robot on grass", ""]
    states, _ = pipeline.encode_prompt([*prompts], "cpu", do_classifier_free_guidance=False)
    for weight, theirs in zip(
        train_flow.encode(pipeline.text_encoder, pipeline.tokenizer, prompts), states
    ):
        torch.testing.assert_close(weight, theirs)
    picture = pipeline(
        prompts[0], height=128, width=128, num_inference_steps=2, guidance_scale=1.5
    ).images[0]
    assert picture.size == (128, 128)


def test_a_finished_base_trains_on_with_a_new_autoencoder(state, tmp_path):
    start, vae = get_assets_folder() / "toy-zimage", tmp_path / "vae"
    vae_model = AutoencoderKL.from_pretrained(BASE / "vae", torch_dtype=torch.float16)
    vae_model.register_to_config(scaling_factor=0.5)
    vae_model.save_pretrained(vae)
    arguments = ["--start", str(start), "--teacher", "nowhere", "--vae", str(vae), "--steps", "1"]
    still = trained(state, tmp_path / "still", *arguments, "--lr", "0", "--muon_lr", "0")
    before = load_file(start / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(still[name], before[name]) for name in before)
    model = tmp_path / "still" / "model"
    assert AutoencoderKL.from_pretrained(model / "vae").config.scaling_factor == 0.5
    vocabularies = [
        Qwen2Tokenizer.from_pretrained(base / "tokenizer").get_vocab() for base in (start, model)
    ]
    assert vocabularies[0] == vocabularies[1]
    moved = trained(state, tmp_path / "moved", *arguments)
    assert any(not torch.equal(moved[name], before[name]) for name in before)


def test_real_rotary_embeddings_equal_the_stock_ones():
    torch.manual_seed(0)
    transformer = train_flow.build_parts(vocabulary_size=300)["transformer"].eval()
    torch.nn.init.normal_(transformer.all_final_layer["2-1"].linear.weight)
    z, sigma = torch.randn(2, 4, 16, 16), torch.tensor([0.3, 0.8])
    # of 32 and 64 tokens, so that one is masked
    states = [torch.randn(token_count, 128) for token_count in (5, 40)]
    stock = train_flow.run_transformer(transformer, z, sigma, states)
    assert train_flow.install_real_rotary(transformer)
    torch.testing.assert_close(
        train_flow.run_transformer(transformer, z, sigma, states), stock, rtol=1e-4, atol=1e-4
    )
