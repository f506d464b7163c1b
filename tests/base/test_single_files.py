"""Bases of other families than SDXL in one file, in the layout of their authors."""

import shutil

import pytest
import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors.torch import load_file, save_file

from dreambooth_moslora.base.files import facts_of_base
from dreambooth_moslora.base.load import load_pipeline
from dreambooth_moslora.core import UserError
from dreambooth_moslora.plan.memory import size_of_base
from dreambooth_moslora.settings.families import FAMILIES
from dreambooth_moslora.training.loop import train
from tests.helpers.single_file import clip_layout, unet_layout, vae_layout
from tests.helpers.tiny_families import tiny_pipeline
from tests.helpers.tiny_training import paint_photos, tiny_config

Z_IMAGE = {
    "all_final_layer.2-1.": "final_layer.",
    "all_x_embedder.2-1.": "x_embedder.",
    "attention.norm_": "attention.",
    "attention.to_out.0": "attention.out",
    "attention.q.": "attention.q_norm.",
    "attention.k.": "attention.k_norm.",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
PREFIX = "model.diffusion_model."


def z_image_layout(state):
    """The three projections of attention are one matrix."""
    layout = {}
    for name, value in state.items():
        for ours, theirs in Z_IMAGE.items():
            name = name.replace(ours, theirs)
        if "attention.to_q." in name:
            three = [state[name.replace("to_q", f"to_{one}")] for one in "qkv"]
            layout[PREFIX + name.replace("to_q", "qkv")] = torch.cat(three)
        elif not name.endswith(("to_k.weight", "to_v.weight")):
            layout[PREFIX + name] = value
    return layout


def attention_name(name):
    """Of a VAE's attention, as its authors call it."""
    start, middle, rest = name.partition("mid_block.attentions.0.")
    part, dot, kind = rest.rpartition(".")
    return f"{start}mid.attn_1.{VAE_ATTENTION[part]}{dot}{kind}" if middle else name


def sd1_layout(pipe):
    vae = vae_layout(pipe.vae.state_dict())
    parts = {
        PREFIX: unet_layout(pipe.unet.state_dict(), pipe.unet.config.layers_per_block),
        "first_stage_model.": {attention_name(name): value for name, value in vae.items()},
        "cond_stage_model.transformer.text_model.": clip_layout(pipe.text_encoder.state_dict()),
    }
    return {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}


LAYOUTS = {"z_image": lambda pipe: z_image_layout(pipe.transformer.state_dict()), "sd1": sd1_layout}


@pytest.fixture(params=LAYOUTS)
def made(request, tmp_path):
    """The family's facts, its base as a folder, and as a file with the folder's other parts beside it."""
    pipe = tiny_pipeline(request.param, tmp_path / "files")
    pipe.save_pretrained(tmp_path / "folder")
    tensors = {name: value.clone().contiguous() for name, value in LAYOUTS[request.param](pipe).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    facts = next(facts for facts in FAMILIES if facts.name == request.param)
    own = (facts.denoiser,) if facts.style == "flow" else (facts.denoiser, "vae", "text_encoder")

    def others(folder, names):
        return [name for name in names if name.endswith(".safetensors") and any(f"/{part}" in folder for part in own)]

    shutil.copytree(tmp_path / "folder", tmp_path / "model", ignore=others)
    return facts, tmp_path / "folder", tmp_path / "model.safetensors"


@pytest.mark.slow
def test_a_file_is_the_same_model_as_its_folder_and_trains(made, tmp_path):
    facts, folder, file = made
    assert facts_of_base(file) is facts
    ours, truth = (getattr(load_pipeline(base), facts.denoiser).state_dict() for base in (file, folder))
    assert ours.keys() == truth.keys() and all(torch.equal(ours[name], truth[name]) for name in truth)
    found, photos = [], paint_photos(tmp_path / "photos")
    for base in (folder, file):
        out = tmp_path / base.stem / "run"
        train(tiny_config(base, photos, out, target_modules=("to_q", "to_k", "to_v", "to_out.0"), max_train_steps=1))
        found.append(load_file(out / "pytorch_lora_weights.safetensors"))
    torch.testing.assert_close(*found, rtol=0, atol=5e-5)


def test_a_file_without_the_rest_is_known_by_its_tensors_and_refused_by_the_familys_name(made):
    facts, _, file = made
    shutil.rmtree(file.with_suffix(""))
    assert facts_of_base(file) is facts and size_of_base(None, (), name=str(file)).family is facts
    rest = "configs that belong to them could not be fetched"
    with pytest.raises(UserError, match=rest if facts.style == "ddpm" else "holds Z-Image's transformer alone"):
        load_pipeline(file)


FOUND = {
    "sd3": {"sd35_large": ["joint_blocks.37.x_block.mlp.fc1.weight"]},
    "flux": {
        "flux-dev": ["double_blocks.0.img_attn.norm.key_norm.scale", "guidance_in.in_layer.bias", "img_in.weight"]
    },
    "flux2": {"flux-2-dev": ["double_blocks.0.img_attn.norm.key_norm.scale"]},
    "z_image": {"z-image-turbo": ["cap_embedder.0.weight"]},
    "krea2": {"krea2": []},
    "lumina2": {"lumina2": ["cap_embedder.0.weight"]},
    "sana": {"sana": []},
}
"""Family -> diffusers' word for it, and what else such a file has."""


@pytest.mark.parametrize("name", FOUND)
def test_the_mark_of_a_family_is_found_as_diffusers_finds_it(name, tmp_path):
    facts = next(facts for facts in FAMILIES if facts.name == name)
    ((word, others),) = FOUND[name].items()
    for prefix in ("", PREFIX):
        tensors = {prefix + key: torch.zeros(64, 64) for key in (facts.file_mark, *others)}
        save_file(tensors, tmp_path / "one.safetensors")
        assert facts_of_base(tmp_path / "one.safetensors") is facts
        assert infer_diffusers_model_type(tensors) == word or (prefix and name in ("flux", "sana"))
