"""A modular pipeline as a base: found, loaded, trained and drawn as diffusers' own blocks do."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AnimaAutoBlocks, ModularPipeline
from diffusers.loaders.single_file_utils import (
    convert_cosmos_transformer_checkpoint_to_diffusers,
)
from diffusers.modular_pipelines.anima.encoders import encode_vae_image
from safetensors.torch import load_file, save_file

from dreambooth_moslora.base import load, model_files
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.families import build_family
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.image_params import GenerationParams
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.step import TrainStep
from tests.helpers.tiny_families import tiny_pipeline
from tests.helpers.tiny_training import paint_photos, tiny_config

PROMPT, NEGATIVE = "1girl, sks dog, looking at viewer", "lowres, a much longer negative prompt"
COMMIT = "0" * 40


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("anima")
    tiny_pipeline("anima", folder / "files").save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return paint_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def stock(base):
    return load_stock(base)


def load_stock(base: Path):
    """Load diffusers' modular pipeline."""
    pipe = ModularPipeline.from_pretrained(str(base))
    pipe.load_components(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_stock(pipe, prompt: str = PROMPT, **options) -> torch.Tensor:
    """Draw by diffusers' pipeline, (1, 3, 64, 96)."""
    return pipe(
        prompt=prompt,
        num_inference_steps=3,
        height=64,
        width=96,
        generator=[torch.Generator().manual_seed(4)],
        output_type="pt",
        **options,
    ).images


def test_it_is_found_in_a_folder_and_in_the_hubs_cache(base, tmp_path):
    model = tmp_path / "models--owner--some-anima"
    shutil.copytree(base, model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    cached = Base.find("owner/some-anima", cache_dir=str(tmp_path))
    for either in (Base.find(base), cached):
        either.check()
        assert either.facts.name == "anima" and either.shapes["text_conditioner"]
        assert load.load_pipeline(either).transformer.config.num_layers == 2
    assert not (base / model_files.INDEX_NAME).exists()


@pytest.mark.parametrize("part", ["text_conditioner", "t5_tokenizer", "vae"])
def test_a_missing_part_is_one_line(base, tmp_path, part):
    """diffusers' modular pipeline would only warn."""
    shutil.copytree(base, tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / part)
    with pytest.raises(UserError, match=part):
        load.load_pipeline(tmp_path / "base")


@torch.no_grad()
def test_images_equal_those_of_the_modular_pipeline(base, stock):
    ours = SubjectPipeline.from_base(base, device="cpu")
    params = {"seed": 4, "steps": 3, "height_px": 64, "width_px": 96}
    for guidance in (4.0, 1.0):
        stock.guider = stock.guider.from_config(stock.guider.config, guidance_scale=guidance)
        theirs = draw_stock(stock, negative_prompt=NEGATIVE)
        (image,) = ours.draw(GenerationParams(PROMPT, NEGATIVE, guidance_scale=guidance, **params))
        pixels = torch.from_numpy(np.asarray(image.pixels).copy()) / 255
        assert (pixels.permute(2, 0, 1) - theirs[0]).abs().max() <= 0.5 / 255 + 1e-6


@torch.no_grad()
def test_latents_equal_those_of_diffusers_encoder(base, stock):
    pixels = torch.rand(1, 3, 64, 96) * 2 - 1
    ours = build_family(load.load_pipeline(base)).encode_latents(stock.vae, pixels)
    options = {"generator": None, "device": pixels.device, "dtype": pixels.dtype}
    theirs = encode_vae_image(pixels, stock.vae, latent_channels=4, **options)
    assert (ours - theirs[:, :, 0]).abs().max() < 1e-6


def test_a_step_equals_one_of_diffusers_blocks(base, stock, photos, tmp_path, monkeypatch):
    """Inputs, target and loss of the first step."""
    batches, steps = [], []

    def note(step, micro_batch, prediction, base_prediction):
        loss = compute_loss(step, micro_batch, prediction, base_prediction)
        steps.append((micro_batch, prediction, loss))
        return loss

    compute_loss, load_batch = TrainStep.compute_loss, TrainStep.load_batch
    monkeypatch.setattr(TrainStep, "compute_loss", note)
    monkeypatch.setattr(
        TrainStep,
        "load_batch",
        lambda *arguments: batches.append(load_batch(*arguments)) or batches[-1],
    )
    train(tiny_config(base, photos, tmp_path / "run", max_train_steps=1, instance_prompt=PROMPT))
    with torch.no_grad():
        compare_step(stock, batches[0].latents, *steps[0])


def compare_step(stock, latents, micro_batch, prediction, loss) -> None:
    """Compute the step by diffusers' parts, and compare."""
    noisy = micro_batch.inputs.noisy_sample

    # The text embedding, by the blocks that encode and condition.
    texts = AnimaAutoBlocks().sub_blocks["text_encoder"].init_pipeline()
    texts.update_components(**{name: getattr(stock, name) for name in texts.components})
    state = texts(prompt=PROMPT)
    conditioned = stock.text_conditioner(
        state.qwen_prompt_embeds,
        state.t5_input_ids,
        state.t5_attention_mask,
        state.qwen_attention_mask,
    )
    ours = micro_batch.inputs.text_embeddings[0]["prompt_embeds"]
    assert conditioned.shape == (1, 512, 16) and (ours - conditioned).abs().max() < 1e-6

    # The latents with the noise that the target implies, by the scheduler.
    scheduler = type(stock.scheduler).from_config(stock.scheduler.config)  # unused so far
    noised = scheduler.scale_noise(latents, noisy.timesteps, latents + micro_batch.target)
    assert (noised - noisy.denoiser_input).abs().max() < 1e-6

    # The prediction, by the transformer as the denoising block calls it.
    theirs = stock.transformer(
        hidden_states=noisy.denoiser_input[:, :, None],
        timestep=noisy.timesteps / stock.scheduler.config.num_train_timesteps,
        encoder_hidden_states=conditioned,
        padding_mask=torch.zeros(1, 1, 64, 64),
        return_dict=False,
    )[0][:, :, 0]
    assert (theirs - prediction).abs().max() < 1e-6
    expected = (theirs - micro_batch.target).square().mean()
    assert float(loss.total) == pytest.approx(float(expected), abs=1e-6)


@pytest.fixture(scope="module")
def adapter(base, photos, tmp_path_factory) -> Path:
    """A run's file, with an adapter on a layer of each kind."""
    folder = tmp_path_factory.mktemp("run") / "run"
    names = ("to_q", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear_1", "proj_out")
    train(tiny_config(base, photos, folder, target_modules=names, learning_rate=0.3))
    return folder / "pytorch_lora_weights.safetensors"


@torch.no_grad()
def test_the_file_draws_the_same_in_a_stock_pipeline(base, adapter):
    stock = load_stock(base)
    plain = draw_stock(stock)
    stock.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
    theirs = draw_stock(stock)
    ours = SubjectPipeline.from_base(base, device="cpu")
    name = ours.load_adapter(adapter)
    params = GenerationParams(
        PROMPT, seed=4, steps=3, height_px=64, width_px=96, adapters=((name, 1.0),)
    )
    (image,) = ours.draw(params)
    pixels = torch.from_numpy(np.asarray(image.pixels).copy()) / 255
    assert (pixels.permute(2, 0, 1) - theirs[0]).abs().max() <= 0.5 / 255 + 1e-5
    assert (plain - theirs).abs().max() > 0.05


def test_comfyui_patches_the_same_weights_by_the_same(base, adapter):
    """Its key map (`comfy/lora.py`) has the name of each weight of the original checkpoint, without
    its ending; diffusers' converter of checkpoints says which weight that is."""
    tensors = load_file(adapter)
    names = sorted({key.rpartition(".lora_")[0] for key in tensors})
    assert names and all(name.startswith("diffusion_model.") for name in names)
    assert {key.rpartition(".lora_")[2] for key in tensors} == {"A.weight", "B.weight"}
    original = {
        f"net.{name.removeprefix('diffusion_model.')}.weight": torch.tensor(index)
        for index, name in enumerate(names)
    }
    converted = convert_cosmos_transformer_checkpoint_to_diffusers(original)

    subject = SubjectPipeline.from_base(base, device="cpu")
    subject.load_adapter(adapter)
    for key, index in converted.items():
        name = names[int(index)]
        patch = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        layer = subject.pipeline.transformer.get_submodule(key.removesuffix(".weight"))
        (adapter_name,) = layer.lora_A
        assert torch.equal(layer.get_delta_weight(adapter_name), patch)


def test_a_file_of_sd_scripts_is_a_start(base, photos, tmp_path):
    name = "lora_unet_blocks_0_cross_attn_output_proj"
    down, up = torch.randn(4, 32), torch.randn(32, 4)
    save_file(
        {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(2.0),
        },
        tmp_path / "start.safetensors",
    )
    layer = "transformer_blocks.0.attn2.to_out.0"
    settings = {"rank": 4, "max_train_steps": 1, "learning_rate": 1e-9, "target_modules": (layer,)}
    start = str(tmp_path / "start.safetensors")
    train(tiny_config(base, photos, tmp_path / "run", init_adapter=start, **settings))
    tensors = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    original = "diffusion_model.blocks.0.cross_attn.output_proj.lora_"
    assert tensors.keys() == {f"{original}A.weight", f"{original}B.weight"}
    change = tensors[f"{original}B.weight"] @ tensors[f"{original}A.weight"]
    torch.testing.assert_close(change, 2 / 4 * up @ down, rtol=1e-4, atol=1e-4)
