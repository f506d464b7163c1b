"""A modular pipeline as a base: found, loaded, trained and drawn as diffusers' own blocks do."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnimaAutoBlocks, Flux3AutoBlocks, ModularPipeline
from diffusers.loaders.single_file_utils import (
    convert_cosmos_transformer_checkpoint_to_diffusers,
)
from diffusers.modular_pipelines.anima.encoders import encode_vae_image
from diffusers.modular_pipelines.flux3.before_denoise import (
    Flux3TextRoPEInputsStep,
    _prepare_image_ids,
)
from diffusers.modular_pipelines.flux3.encoders import Flux3VaeEncoderStep
from safetensors.torch import load_file, save_file
from torch import Tensor

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


@pytest.fixture(scope="module", params=["anima", "flux3"])
def base(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("family") / request.param
    tiny_pipeline(request.param, folder / "files").save_pretrained(folder / "base")
    return folder / "base"


def get_family(base: Path) -> "StockFamily":
    return FAMILIES[base.parent.name]


only_anima = pytest.mark.parametrize("base", ["anima"], indirect=True)


@dataclass(frozen=True)
class StockFamily:
    """What diffusers' blocks compute of a family.

    encode_prompt: (stock pipeline, prompt) -> (1, T, D)
    encode_image: (VAE, pixels (1, 3, H, W)) -> (1, C, h, w)
    predict: (transformer, z (1, C, h, w), time in [0, 1], text embedding) -> (1, C, h, w)
    parts: whose absence is an error
    """

    encode_prompt: Callable[[Any, str], Tensor]
    encode_image: Callable[[Any, Tensor], Tensor]
    predict: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    parts: tuple[str, ...]


def encode_anima_prompt(stock, prompt: str) -> Tensor:
    texts = AnimaAutoBlocks().sub_blocks["text_encoder"].init_pipeline()
    texts.update_components(**{name: getattr(stock, name) for name in texts.components})
    state = texts(prompt=prompt)
    return stock.text_conditioner(
        state.qwen_prompt_embeds,
        state.t5_input_ids,
        state.t5_attention_mask,
        state.qwen_attention_mask,
    )


def encode_anima_image(vae, pixels: Tensor) -> Tensor:
    options = {"generator": None, "device": pixels.device, "dtype": pixels.dtype}
    return encode_vae_image(pixels, vae, latent_channels=4, **options)[:, :, 0]


def predict_anima(transformer, z: Tensor, time: Tensor, embeds: Tensor) -> Tensor:
    return transformer(
        hidden_states=z[:, :, None],
        timestep=time,
        encoder_hidden_states=embeds,
        padding_mask=torch.zeros(1, 1, 64, 64),
        return_dict=False,
    )[0][:, :, 0]


def encode_flux3_prompt(stock, prompt: str) -> Tensor:
    texts = Flux3AutoBlocks().sub_blocks["text_encoder"].init_pipeline()
    texts.update_components(**{name: getattr(stock, name) for name in texts.components})
    return texts(prompt=prompt).prompt_embeds


def encode_flux3_image(vae, pixels: Tensor) -> Tensor:
    z = Flux3VaeEncoderStep._patchify_latents(vae.encode(pixels).latent_dist.mode())
    variance = vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps
    return (z - vae.bn.running_mean.view(1, -1, 1, 1)) / variance.sqrt()


def predict_flux3(transformer, z: Tensor, time: Tensor, embeds: Tensor) -> Tensor:
    return (
        transformer(
            hidden_states=z.flatten(2).transpose(1, 2),
            timestep=time,
            encoder_hidden_states=embeds,
            img_ids=_prepare_image_ids(*z.shape[-2:], image_rope_scale=0.5),
            txt_ids=Flux3TextRoPEInputsStep._prepare_text_ids(embeds),
            return_dict=False,
        )[0]
        .transpose(1, 2)
        .reshape(z.shape)
    )


FAMILIES = {
    "anima": StockFamily(
        encode_prompt=encode_anima_prompt,
        encode_image=encode_anima_image,
        predict=predict_anima,
        parts=("text_conditioner", "t5_tokenizer", "vae"),
    ),
    "flux3": StockFamily(
        encode_prompt=encode_flux3_prompt,
        encode_image=encode_flux3_image,
        predict=predict_flux3,
        parts=("text_encoder", "tokenizer", "vae"),
    ),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return paint_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def stock(base):
    return load_stock(base)


def load_stock(base: Path):
    """Load diffusers' modular pipeline."""
    blocks = ModularPipeline.from_pretrained(str(base)).blocks
    blocks.sub_blocks.pop("prompt_upsampler", None)
    pipe = blocks.init_pipeline(str(base))
    pipe.load_components(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_stock(pipe, prompt: str = PROMPT, **options) -> Tensor:
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
        assert either.facts.name == base.parent.name and either.shapes["text_encoder"]
        assert load.load_pipeline(either).transformer.config.num_layers == 2
    assert not (base / model_files.INDEX_NAME).exists()


def test_a_missing_part_is_one_line(base, tmp_path):
    """diffusers' modular pipeline would only warn."""
    for part in get_family(base).parts:
        shutil.copytree(base, tmp_path / part)
        shutil.rmtree(tmp_path / part / part)
        with pytest.raises(UserError, match=f"/{part} is missing"):
            load.load_pipeline(tmp_path / part)


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
    theirs = get_family(base).encode_image(stock.vae, pixels)
    assert (ours - theirs).abs().max() < 2e-6


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
        compare_step(get_family(base), stock, batches[0].latents, *steps[0])


def compare_step(family, stock, latents, micro_batch, prediction, loss) -> None:
    """Compute the step by diffusers' parts, and compare."""
    noisy = micro_batch.inputs.noisy_sample

    # The text embedding, by the blocks that encode it.
    embeds = family.encode_prompt(stock, PROMPT)
    ours = micro_batch.inputs.text_embeddings[0]["prompt_embeds"]
    assert ours.shape == embeds.shape[1:] and (ours - embeds).abs().max() < 1e-6

    # The latents with the noise that the target implies, by the scheduler.
    scheduler = type(stock.scheduler).from_config(stock.scheduler.config)  # unused so far
    noised = scheduler.scale_noise(latents, noisy.timesteps, latents + micro_batch.target)
    assert (noised - noisy.denoiser_input).abs().max() < 1e-6

    # The prediction, by the transformer as the denoising block calls it.
    time = noisy.timesteps / stock.scheduler.config.num_train_timesteps
    theirs = family.predict(stock.transformer, noisy.denoiser_input, time, embeds)
    assert (theirs - prediction).abs().max() < 1e-6
    expected = (theirs - micro_batch.target).square().mean()
    assert float(loss.total) == pytest.approx(float(expected), abs=1e-6)


@pytest.fixture(scope="module")
def adapter(base, photos, tmp_path_factory) -> Path:
    """A run's file, with an adapter on a layer of each kind."""
    folder = tmp_path_factory.mktemp("run") / "run"
    names = ("to_q", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear_1", "proj_out")
    if base.parent.name == "flux3":
        names = ("*.attn.to_q", "single_transformer_blocks.*", "proj_out")
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


@only_anima
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


@only_anima
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


@pytest.mark.parametrize("base", ["flux3"], indirect=True)
def test_a_distilled_base_is_refused_and_names_the_base(base, tmp_path):
    """It would need the timestep to which each step jumps."""
    shutil.copytree(base, tmp_path / "base")
    index = tmp_path / "base" / model_files.MODULAR_INDEX_NAME
    content = json.loads(index.read_text()) | {"_class_name": "Flux3DistilledModularPipeline"}
    index.write_text(json.dumps(content))
    save_file({"ref_time_in.in_layer.weight": torch.zeros(1)}, tmp_path / "file.safetensors")
    hub = Base.find("black-forest-labs/flux-3-image-klein")
    message = "flux-3-image-klein-base"
    for find in (
        lambda: Base.find(tmp_path / "base").check(),
        lambda: Base.find(tmp_path / "file.safetensors").check(),
        lambda: hub.distilled,
    ):
        with pytest.raises(UserError, match=message):
            find()
    assert Base.find("cagliostrolab/animagine-xl-lightning").distilled == ""
