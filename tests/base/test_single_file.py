"""A base that is one checkpoint file: it is the same model as its diffusers folder, and what is missing is said."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from dreambooth_moslora.base import load
from dreambooth_moslora.base.decode import load_vae_alone
from dreambooth_moslora.core import UserError
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.prepare import noise_schedule
from tests.helpers.single_file import save_single_file
from tests.helpers.tiny_training import paint_photos, tiny_config


@pytest.fixture(scope="module")
def checkpoint(tiny_base, tmp_path_factory):
    """model.safetensors, and beside it `model` with the configs and no weights."""
    folder = tmp_path_factory.mktemp("single")
    shutil.copytree(tiny_base, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return save_single_file(StableDiffusionXLPipeline.from_pretrained(tiny_base), folder / "model.safetensors")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_it_is_the_same_model_as_the_folder(part, checkpoint, tiny_base):
    ours, truth = (getattr(load.load_pipeline(name), part).state_dict() for name in (checkpoint, tiny_base))
    assert ours.keys() == truth.keys()
    assert all(torch.equal(ours[name], truth[name]) for name in truth)


@pytest.mark.slow
def test_training_on_it_ends_with_the_adapter_of_the_folder(checkpoint, tiny_base, tmp_path):
    photos = paint_photos(tmp_path / "photos")
    for name, model in (("file", checkpoint), ("folder", tiny_base)):
        train(tiny_config(model, photos, tmp_path / name, max_train_steps=2))
    ours, truth = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("file", "folder"))
    # The weights are equal bit for bit; where they lie in memory decides the last bit of a product on some processors.
    torch.testing.assert_close(ours, truth, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target_modules": ("to_q", "conv9")}, "--target_modules conv9: the UNet has no such layer"),
        ({"target_modules": ("to_q", "norm1")}, "--target_modules norm1: the UNet has no such layer"),
        ({"target_modules": ("conv1",), "use_dora": True}, "--use_dora: .*conv1 is a convolution"),
    ],
)
def test_wrong_layers_are_told_before_class_images_are_drawn(changes, says, checkpoint, tmp_path):
    config = tiny_config(checkpoint, paint_photos(tmp_path / "photos"), tmp_path / "run", **changes)
    prior = {"with_prior_preservation": True, "class_prompt": "a photo of a dog", "prior": "class_images"}
    with pytest.raises(UserError, match=says):
        train(replace(config, **prior))
    assert not (tmp_path / "run" / "class_images").exists()


def test_a_mark_says_that_velocity_is_predicted(checkpoint, tmp_path):
    shutil.copytree(checkpoint.with_suffix(""), tmp_path / "noob")
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file({**load_file(checkpoint), **marks}, tmp_path / "noob.safetensors")
    scheduler = load.load_pipeline(tmp_path / "noob.safetensors").scheduler
    assert noise_schedule(scheduler).prediction_type == "v_prediction"
    assert scheduler.config.timestep_spacing == "trailing"


def test_its_vae_alone_is_read_with_the_same_configs(checkpoint, tiny_base):
    ours, truth = load_vae_alone(checkpoint).state_dict(), load_vae_alone(tiny_base).state_dict()
    assert all(torch.equal(ours[name], truth[name]) for name in truth)


def test_without_configs_and_without_a_hub_one_line_says_what_to_do(checkpoint, tmp_path):
    alone = shutil.copy(checkpoint, tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match="holds weights alone") as error:
        load.load_pipeline(alone)
    assert str(tmp_path / "alone") + "." in str(error.value) and "\n" not in str(error.value)


def without_vae(tensors):
    return {name: value for name, value in tensors.items() if not name.startswith("first_stage_model")}


def a_lora(tensors):
    return {"unet.down_blocks.1.attn.to_q.lora_A.weight": torch.zeros(4, 8)}


def of_other_widths(tensors):
    return {name: value[..., :1].contiguous() if value.ndim else value for name, value in tensors.items()}


@pytest.mark.parametrize("change", [without_vae, a_lora, of_other_widths])
def test_a_file_of_something_else_is_one_line(change, checkpoint, tmp_path):
    shutil.copytree(checkpoint.with_suffix(""), tmp_path / "odd")
    save_file(change(load_file(checkpoint)), tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="odd"):
        load.load_pipeline(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", json.dumps({}).encode() * 10])
def test_a_damaged_file_is_one_line(content, checkpoint, tmp_path):
    shutil.copytree(checkpoint.with_suffix(""), tmp_path / "torn")
    (tmp_path / "torn.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="torn"):
        load.load_pipeline(tmp_path / "torn.safetensors")
