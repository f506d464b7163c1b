"""`--init_adapter`: a run that goes on from a file."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from dreambooth_moslora.adapters.metadata import AdapterMetadata
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.plan.checks import preflight
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_adapters import save_diffusers_lora
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config
from tests.training.test_resume import stop_at


@pytest.fixture
def file(tiny_base, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    return save_diffusers_lora(unet, tmp_path / "old", seed=1, rank=3, size=0.1)


@pytest.fixture
def config(tiny_base, tmp_path, file):
    photos = paint_photos(tmp_path / "photos")
    start = {"target_modules": ("to_q", "to_k"), "init_adapter": str(file)}
    return lambda **changes: tiny_config(tiny_base, photos, tmp_path / "run", **start | changes)


def deltas(path):
    tensors = load_file(path)
    ends = (".lora_A.weight", ".lora_B.weight")
    modules = {key.removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])}
    return {name: tensors[name + ends[1]].double() @ tensors[name + ends[0]].double() for name in modules}


def test_at_a_rate_of_zero_the_published_file_is_the_one_it_began_with(config, file, tmp_path, caplog):
    train(config(learning_rate=0.0, max_train_steps=1, rank=5, lora_alpha=2))
    found, given = deltas(RunDir(tmp_path / "run").adapter_path), deltas(file)
    assert found and all(torch.dist(found[n], given[n]) < 1e-5 * given[n].norm() for n in found)
    said = [line for line in caplog.messages if "--init_adapter" in line]
    assert len(said) == 1 and f"{len(found)} layers go on from it, largest relative deviation" in said[0]
    assert f"{len(given) - len(found)} layers (unet." in said[0]


@pytest.mark.slow
def test_it_learns_on_and_a_resumed_run_needs_the_file_no_more(config, file, tmp_path):
    train(config(seed=1, max_train_steps=3))
    unbroken, found, given = (
        adapter_sha256(tmp_path / "run"),
        deltas(RunDir(tmp_path / "run").adapter_path),
        deltas(file),
    )
    assert all(1e-4 < torch.dist(found[n], given[n]) / given[n].norm() < 0.9 for n in found)
    should_stop, on_event = stop_at(2)
    train(config(seed=1, max_train_steps=3), on_event, should_stop)
    file.unlink()
    train(config(seed=1, max_train_steps=3, resume_from_checkpoint="latest"))
    assert adapter_sha256(tmp_path / "run") == unbroken


def test_new_tokens_in_the_file_are_said_before_the_base_is_loaded(config, file):
    note = {"word": "sks", "count": 2, "file": "dog_emb.safetensors", "sha256": "0" * 64}
    save_file(load_file(file), file, {"moslora": AdapterMetadata(4, 4.0, tokens=note).to_json()})
    with pytest.raises(UserError, match=r"--init_adapter .*: it has learnt new tokens for 'sks'"):
        preflight(config())
    file.write_bytes(b"no adapter")
    with pytest.raises(UserError, match=r"--init_adapter .*: it is not a safetensors file"):
        preflight(config())


def test_a_file_that_is_not_there_is_said_before_the_base_is_loaded(config, file):
    file.unlink()
    with pytest.raises(UserError, match=r"--init_adapter .*: there is no such file or folder"):
        preflight(config())
