"""Bases that are damaged, foreign or half fetched: `--dry_run` and training refuse them in the same line. One that is a
single file is the same model as its folder."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save, save_file

from dreambooth_moslora.base import load
from dreambooth_moslora.base.decode import load_vae_alone
from dreambooth_moslora.base.files import base_folder, variants_in, weight_files
from dreambooth_moslora.core import UserError
from dreambooth_moslora.plan.checks import preflight
from dreambooth_moslora.plan.memory import size_of_base
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.prepare import noise_schedule
from tests.helpers.single_file import save_single_file
from tests.helpers.tiny_training import paint_photos, tiny_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 492265168\n"
UNET, TEXT = Path("unet/diffusion_pytorch_model.safetensors"), Path("text_encoder/model.safetensors")


@pytest.fixture
def base(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "base")


def rename_tensors(file):
    save_file({f"other.{name}": value for name, value in load_file(file).items()}, file)


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def cut(file, length):
    file.write_bytes(file.read_bytes()[:length])


DAMAGES = {
    "a pointer for the UNet": (lambda base: (base / UNET).write_text(POINTER), r"unet.* is a git-lfs pointer"),
    "a pointer for a text encoder": (lambda base: (base / TEXT).write_text(POINTER), r"text_encoder.*`git lfs pull`"),
    "half a file": (lambda base: cut(base / UNET, -1000), r"cut short.*not fully covered\): fetch it again"),
    "half a header": (lambda base: cut(base / UNET, 100), r"is damaged, cut short.*header"),
    "an empty file": (lambda base: cut(base / UNET, 0), r"not a safetensors file \(.*header too small"),
    "no UNet": (lambda base: shutil.rmtree(base / "unet"), "unet is missing"),
    "no weights": (lambda base: (base / UNET).unlink(), "has no weights"),
    "no tokenizer": (lambda base: shutil.rmtree(base / "tokenizer"), "tokenizer is missing"),
    "another model's UNet": (lambda base: rename_tensors(base / UNET), r"another model: it has no conv_in\.weight"),
    "another text encoder": (lambda base: rename_tensors(base / TEXT), "text_encoder holds weights of another model"),
    "a broken index": (lambda base: (base / "model_index.json").write_text("{"), "model_index.json cannot be read"),
    "no second text encoder": (
        lambda base: change(base / "model_index.json", text_encoder_2=[None, None]),
        "not an SDXL base model: its model_index.json names no text_encoder_2",
    ),
    "no size conditioning": (
        lambda base: change(base / "unet" / "config.json", addition_embed_type=None),
        "not an SDXL base model: its UNet",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_base_is_one_line_and_the_same_in_dry_run_and_in_training(name, base):
    damage, says = DAMAGES[name]
    damage(base)
    with pytest.raises(UserError, match=says) as seen:
        base_folder(TrainConfig(pretrained_model_name_or_path=base))
    with pytest.raises(UserError, match=says) as loaded:
        load.load_pipeline(base)
    assert str(seen.value) == str(loaded.value) and "\n" not in str(seen.value)


def test_what_only_the_loader_can_see_is_one_line_too(base, tiny_base):
    save_file({k: v for k, v in load_file(base / UNET).items() if k != "conv_out.bias"}, base / UNET)
    with pytest.raises(UserError, match=r"not whole: the files of its unet have no conv_out\.bias"):
        load.load_pipeline(base)
    shutil.copy(tiny_base / UNET, base / UNET)
    weights = load_file(base / TEXT)
    last = max(name for name in weights if name.endswith("layer_norm2.weight"))
    save_file(weights | {last: torch.zeros(3, 3)}, base / TEXT)
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load.load_pipeline(base)
    assert "\n" not in str(caught.value)


def test_only_the_files_that_are_loaded_need_be_whole(base):
    shutil.copy(base / UNET, base / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    whole = size_of_base(base_folder(TrainConfig(pretrained_model_name_or_path=base)), ("to_q",))
    (base / UNET).write_text(POINTER)
    folder = base_folder(TrainConfig(pretrained_model_name_or_path=base, variant="fp16"))
    assert size_of_base(folder, ("to_q",), "fp16") == whole


def test_a_single_file_is_looked_at_too(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text(POINTER)
    with pytest.raises(UserError, match="git-lfs pointer"):
        base_folder(TrainConfig(pretrained_model_name_or_path=file))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("{base}/missing", "the VAE .*missing is neither a diffusers folder"),
        ("{base}/vae/config.json", "the VAE .*json is neither a diffusers folder"),
        ("{base}", "config.json cannot be read"),
        ("{base}/unet", r"another model: it has no encoder\.conv_in\.weight"),
    ],
)
def test_another_vae_is_looked_at_before_a_run_and_before_a_dry_one(base, name, says):
    def config(vae):
        return TrainConfig(pretrained_model_name_or_path=str(base), pretrained_vae_model_name_or_path=vae)

    preflight(config(str(base / "vae")))
    preflight(config("owner/vae"))
    with pytest.raises(UserError, match=says):
        preflight(config(name.format(base=base)))


@pytest.mark.parametrize("name", ["a.fp16", "a.fp16-00001-of-00002", "a-00001-of-00002.fp16"])
def test_the_variants_of_a_component_are_read_from_its_file_names(name, tmp_path):
    for file in (f"{name}.safetensors", "a.safetensors", "a-00001-of-00002.safetensors", "b.ema.bin", "a.json"):
        (tmp_path / file).touch()
    assert variants_in(tmp_path) == ["fp16"]
    assert [file.stem for file in weight_files(tmp_path, "fp16")] == [name]
    assert variants_in(tmp_path / "none") == []


@pytest.fixture(scope="module")
def checkpoint(tiny_base, tmp_path_factory):
    """model.safetensors, and beside it `model` with the configs and no weights."""
    folder = tmp_path_factory.mktemp("single")
    shutil.copytree(tiny_base, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return save_single_file(StableDiffusionXLPipeline.from_pretrained(tiny_base), folder / "model.safetensors")


def test_it_is_the_same_model_as_the_folder(checkpoint, tiny_base):
    """Its VAE is read alone too."""
    ours, truth = load.load_pipeline(checkpoint), load.load_pipeline(tiny_base)
    pairs = [(getattr(ours, part), getattr(truth, part)) for part in ("unet", "vae", "text_encoder", "text_encoder_2")]
    for one, other in (*pairs, (load_vae_alone(checkpoint), load_vae_alone(tiny_base))):
        found, wanted = one.state_dict(), other.state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


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


def odd_copy(checkpoint, folder, tensors):
    """Another file beside a copy of the checkpoint's configs: of tensors or of bytes."""
    shutil.copytree(checkpoint.with_suffix(""), folder / "odd")
    (folder / "odd.safetensors").write_bytes(tensors if isinstance(tensors, bytes) else save(tensors))
    return folder / "odd.safetensors"


def test_a_mark_says_that_velocity_is_predicted(checkpoint, tmp_path):
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    scheduler = load.load_pipeline(odd_copy(checkpoint, tmp_path, load_file(checkpoint) | marks)).scheduler
    assert noise_schedule(scheduler).prediction_type == "v_prediction"
    assert scheduler.config.timestep_spacing == "trailing"


def test_without_configs_and_without_a_hub_one_line_says_what_to_do(checkpoint, tmp_path):
    alone = shutil.copy(checkpoint, tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match="holds weights alone") as error:
        load.load_pipeline(alone)
    assert str(tmp_path / "alone") + "." in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {name: value for name, value in tensors.items() if not name.startswith("first_stage_model")},
        lambda tensors: {"unet.down_blocks.1.attn.to_q.lora_A.weight": torch.zeros(4, 8)},
        lambda tensors: {n: value[..., :1].contiguous() if value.ndim else value for n, value in tensors.items()},
        lambda tensors: b"",
        lambda tensors: b"not a checkpoint",
        lambda tensors: b"{}" * 10,
    ],
    ids=["no VAE", "a LoRA", "other widths", "empty", "text", "JSON"],
)
def test_a_file_of_something_else_is_one_line(change, checkpoint, tmp_path):
    with pytest.raises(UserError, match="odd"):
        load.load_pipeline(odd_copy(checkpoint, tmp_path, change(load_file(checkpoint))))
