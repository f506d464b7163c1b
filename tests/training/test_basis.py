"""`--basis`: a run that trains mixers alone, and what it leaves."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth_moslora.adapters.basis import read_mixers
from dreambooth_moslora.adapters.metadata import AdapterMetadata
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import RAW_NAME, RunDir, files_by_name, run_files
from dreambooth_moslora.generation.params import GenerationParams
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.plan.checks import check_settings
from dreambooth_moslora.settings.sources import checked_recipe, recipe_of
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny import save_tiny_sdxl
from tests.helpers.tiny_training import tiny_config

PARAMS = GenerationParams("a photo of sks dog", seed=3, steps=2, guidance_scale=1.0)


@pytest.fixture(scope="module")
def config(tiny_base, photos):
    def make(output, **changes):
        given = {"basis": "svd", "rank": 3, "lora_alpha": 2, "max_train_steps": 2, "target_modules": ("to_q", "conv1")}
        return tiny_config(tiny_base, photos, output, **given | changes)

    return make


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    """Two subjects on the basis svd, in one folder."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("dog", 1), ("cat", 2)):
        train(config(folder / name, seed=seed, learning_rate=0.3))
    return folder


def picture(subject, *adapters):
    (image,) = subject.draw(PARAMS.__class__(**vars(PARAMS) | {"adapters": tuple(adapters)}))
    return np.asarray(image.pixels).astype(int)


@pytest.fixture
def loaded(tiny_base, runs):
    subject = SubjectPipeline.from_base(tiny_base)
    for name in ("dog", "cat"):
        subject.load_adapter(runs / name)
        assert subject.load_adapter(RunDir(runs / name).mixers_path) == f"{name}@mixers"
    return subject


@pytest.mark.slow
def test_mixers_draw_what_the_folded_files_draw_alone_and_together(loaded, tiny_base):
    base = picture(SubjectPipeline.from_base(tiny_base))
    for scales in ((1.0, 0.0), (0.0, 1.0), (0.4, 0.0), (0.8, 0.7), (1.0, 0.0)):
        folded = picture(loaded, ("dog", scales[0]), ("cat", scales[1]))
        mixed = picture(loaded, ("dog@mixers", scales[0]), ("cat@mixers", scales[1]))
        assert np.abs(folded - mixed).max() <= 1 < np.abs(folded - base).max()
    one_of_each = picture(loaded, ("dog", 0.8), ("cat@mixers", 0.7))
    assert np.abs(one_of_each - picture(loaded, ("dog", 0.8), ("cat", 0.7))).max() <= 1
    assert np.array_equal(picture(loaded), base)
    for name in ("dog@mixers", "cat@mixers"):
        loaded.unload_adapter(name)
    assert not any(key.startswith("basis") for key in loaded.pipeline.unet.peft_config)


@pytest.mark.slow
def test_the_files_name_the_basis_and_the_mixers_alone_have_moved(runs, tiny_base):
    mixers = read_mixers(RunDir(runs / "dog").mixers_path)
    assert mixers.metadata.basis["kind"] == "svd" and len(mixers.metadata.basis["sha256"]) == 64
    assert mixers.values.any() and mixers.metadata.recipe["basis"] == "svd"
    raws = [load_file(runs / name / "last" / RAW_NAME) for name in ("dog", "cat")]
    for key in raws[0]:
        assert torch.equal(raws[0][key], raws[1][key]) != key.endswith(".mixer"), key
    assert {"dog", "dog@mixers"} <= set(files_by_name(run_files([runs / "dog"]), [runs]))


@pytest.mark.slow
def test_mixers_of_another_base_are_said_in_one_line(runs, tmp_path):
    other = save_tiny_sdxl(tmp_path)
    unet = other / "unet" / "diffusion_pytorch_model.safetensors"
    unet.write_bytes(unet.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match=r"^mixers\.safetensors was made for other weights: its basis is of a base"):
        SubjectPipeline.from_base(other).load_adapter(RunDir(runs / "dog").mixers_path)


@pytest.mark.slow
def test_a_basis_from_a_file_is_found_beside_above_or_by_name(runs, config, tiny_base, tmp_path):
    file = runs / "dog" / "last" / RAW_NAME
    basis = tmp_path / "of" / "toys.safetensors"
    basis.parent.mkdir()
    basis.write_bytes(file.read_bytes())
    train(config(tmp_path / "of" / "run", basis=str(basis), learning_rate=0.3))
    mixers = RunDir(tmp_path / "of" / "run").mixers_path
    assert read_mixers(mixers).metadata.basis["file"] == "toys.safetensors"
    assert "basis" not in read_mixers(mixers).metadata.recipe
    subject = SubjectPipeline.from_base(tiny_base)
    names = subject.load_adapter(mixers.parent), subject.load_adapter(mixers)
    folded, mixed = (picture(subject, (name, 1.0)) for name in names)
    assert np.abs(folded - mixed).max() <= 1
    moved = basis.rename(tmp_path / "moved.safetensors")
    fresh = SubjectPipeline.from_base(tiny_base)
    with pytest.raises(UserError, match=r"needs its basis, 'toys\.safetensors' .* name it with --basis"):
        fresh.load_adapter(mixers)
    fresh.bases.files.append(moved)
    assert fresh.load_adapter(mixers) == "run@mixers"


@pytest.mark.slow
def test_a_resumed_run_needs_the_same_basis(runs, config, tmp_path):
    resumed = {"resume_from_checkpoint": str(runs / "dog" / "last"), "seed": 1, "max_train_steps": 4}
    with pytest.raises(UserError, match="--basis: last has svd; you ask for None"):
        train(config(tmp_path / "run", **resumed, basis=None))
    with pytest.raises(UserError, match="--basis: last has svd; you ask for file"):
        train(config(tmp_path / "run", **resumed, basis=str(runs / "dog" / "last" / RAW_NAME)))


def test_a_basis_that_is_none_is_said_before_the_base_is_loaded(config, tmp_path, tiny_base):
    single = tmp_path / "model.safetensors"
    single.write_bytes((tiny_base / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    wrong = {
        "--basis svd: model.safetensors is a single file": {"pretrained_model_name_or_path": str(single)},
        "there is no such file; give a raw adapter file, or the word svd": {"basis": "nowhere.safetensors"},
        "it is no raw adapter file": {"basis": str(single)},
    }
    folded = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({"up": torch.ones(1)}, folded, {"moslora": AdapterMetadata(rank=4, alpha=4, mixer="none").to_json()})
    for error, changes in [*wrong.items(), ("it is no raw adapter file", {"basis": str(folded)})]:
        with pytest.raises(UserError, match=error):
            check_settings(config(tmp_path / "run", **changes))


def test_a_recipe_tells_the_basis_svd_and_never_a_file(config, tmp_path):
    assert recipe_of(config(tmp_path))["basis"] == "svd" and "basis" not in recipe_of(config(tmp_path, basis=None))
    assert "basis" not in recipe_of(config(tmp_path, basis="secret.safetensors"))
    assert checked_recipe({"basis": "svd"}) == ({"basis": "svd"}, [])
    assert checked_recipe({"basis": "secret.safetensors"}) == ({}, ["--basis names a file"])
