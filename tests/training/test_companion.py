"""A companion lies under the adapter in training and samples, and is not in what is published."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth_moslora.base import load
from dreambooth_moslora.disk.run_folder import Position, RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import companion
from dreambooth_moslora.method import moslora
from dreambooth_moslora.plan.plan import make_plan
from dreambooth_moslora.settings import field_facts
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training.checkpoint import compare_bases
from dreambooth_moslora.training.loop import train
from tests.helpers.tiers import slow_but
from tests.helpers.tiny_families import tiny_pipeline
from tests.helpers.tiny_training import largest_difference, paint_photos, tiny_config

pytestmark = pytest.mark.usefixtures("two_steps")
LAYERS = ("layers.0.attention.to_q", "layers.1.feed_forward.w1", "noise_refiner.0.attention.to_k")


def save_companion(
    file: Path, denoiser: torch.nn.Module, scale: float = 0.2, **more: torch.Tensor
) -> Path:
    """A LoRA of some layers, one of which the adapter has too."""
    draws = torch.Generator().manual_seed(1)
    tensors = {}
    for path in LAYERS:
        outputs, inputs = moslora.get_weight_size(denoiser.get_submodule(path))
        name = f"transformer.{path}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, inputs, generator=draws)
        tensors[f"{name}.lora_B.weight"] = scale * torch.randn(outputs, 4, generator=draws)
    save_file(tensors | more, file)
    return file


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base whose name says that it is distilled, its companion, and the same base with that
    added."""
    folder = tmp_path_factory.mktemp("bases")
    pipeline = tiny_pipeline("z_image", folder / "files")
    pipeline.save_pretrained(folder / "tiny-turbo")
    file = save_companion(folder / "undo.safetensors", pipeline.transformer)
    companion.add_companion(companion.read_companion(file, pipeline), pipeline.transformer)
    pipeline.save_pretrained(folder / "merged")
    return folder / "tiny-turbo", file, folder / "merged"


@pytest.mark.parametrize("quantization", slow_but(("int8",), ("none", "int8")))
def test_companion_trains_like_a_merged_base(quantization, bases, tmp_path):
    """So the companion was on and frozen, and the published change has none of it."""
    base, file, merged = bases
    photos = paint_photos(tmp_path / "photos")
    usual = {
        "target_modules": field_facts.ATTENTION_LAYERS,
        "base_quantization": quantization,
        "num_validation_images": 1,
        "max_train_steps": 2,
    }
    with_it, without_it = tmp_path / "with", tmp_path / "without"
    train(tiny_config(base, photos, with_it, companion=str(file), **usual))
    train(tiny_config(merged, photos, without_it, **usual))
    assert largest_difference(with_it, without_it) < 1e-7

    # Samples are drawn with it.
    with_companion, merged_sample = (
        folder / "samples" / "step_000002_0.png" for folder in (with_it, without_it)
    )
    assert with_companion.read_bytes() == merged_sample.read_bytes()
    assert "Companion in training, no part of the file | undo.safetensors" in (
        RunDir(with_it).read_card()
    )


@torch.no_grad()
def test_companion_is_rounded_once_in_half_precision(bases, tmp_path):
    """Of a file in half precision too, as most are, with a scale of 3/4."""
    base, file, _ = bases
    halves = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    halves |= {f"transformer.{path}.alpha": torch.tensor(3.0).bfloat16() for path in LAYERS}
    save_file(halves, tmp_path / "half.safetensors")
    pipeline = load.load_pipeline(base, dtype=torch.bfloat16)
    layers = {path: pipeline.transformer.get_submodule(path) for path in LAYERS}
    before = {path: layer.weight.double() for path, layer in layers.items()}
    companion.add_companion(
        companion.read_companion(tmp_path / "half.safetensors", pipeline), pipeline.transformer
    )
    for path, layer in layers.items():
        down, up = (halves[f"transformer.{path}.lora_{part}.weight"].double() for part in "AB")
        truth = (before[path] + 3 / 4 * up @ down).bfloat16()
        assert (layer.weight != truth).float().mean() < 1e-3, path


def test_distilled_base_needs_a_plain_lora_as_companion(bases, tmp_path):
    base, _, _ = bases
    photos = paint_photos(tmp_path / "photos")
    run = {"target_modules": field_facts.ATTENTION_LAYERS}
    with pytest.raises(UserError, match=r"distilled to a few steps: .*as --companion"):
        make_plan(tiny_config(base, photos, tmp_path / "run", **run))
    with pytest.raises(UserError, match="--companion nowhere: there is no such file"):
        make_plan(tiny_config(base, photos, tmp_path / "run", companion="nowhere", **run))

    pipeline = load.load_pipeline(base)
    bias = {f"transformer.{LAYERS[0]}.lora_B.bias": torch.zeros(32)}
    file = save_companion(tmp_path / "odd.safetensors", pipeline.transformer, **bias)
    with pytest.raises(UserError, match="give a plain LoRA of Z-Image's transformer alone"):
        companion.read_companion(file, pipeline)


@pytest.mark.parametrize("quantization", ("none", "int8"))
def test_another_companion_is_another_base_to_go_on_from(
    quantization, bases, prepare_base, tmp_path
):
    """Also where the base is quantized."""
    base, file, merged = bases
    denoiser = load.load_pipeline(merged).transformer
    other_companion = save_companion(tmp_path / "other.safetensors", denoiser, scale=0.3)
    usual = {"target_modules": field_facts.ATTENTION_LAYERS, "base_quantization": quantization}
    identity = prepare_base(base, companion=str(file), **usual).base_identity
    compare = partial(
        compare_bases, TrainConfig(), Path("checkpoint-1"), Position(1, 0, base=identity)
    )
    again = Path(shutil.copy(file, tmp_path / "again.safetensors"))
    assert compare(prepare_base(base, companion=str(again), **usual).base_identity) == []
    for another in (other_companion, None):
        digests = prepare_base(base, companion=another and str(another), **usual).base_identity
        with pytest.raises(UserError, match="trained on a base with other weights"):
            compare(digests)
