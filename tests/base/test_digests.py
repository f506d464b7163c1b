"""A base is recognised by all bytes of the files that decide it, wherever they lie."""

import shutil
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dreambooth_moslora.base import load
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.base.digests import hash_parts
from dreambooth_moslora.settings.family_facts import get_facts
from tests.helpers.changed_base import change_token, flip_last_bit, swap_ids
from tests.helpers.single_file import save_single_file
from tests.helpers.tiny_families import tiny_pipeline

SDXL, Z_IMAGE = get_facts("StableDiffusionXLPipeline"), get_facts("ZImagePipeline")
PARTS = ("unet", "text_encoder", "text_encoder_2", "vae")
COMMIT = "0" * 40


def split(base: Path) -> None:
    """Store the UNet's weights in two files."""
    (file,) = (base / "unet").glob("*.safetensors")
    names = list(tensors := load_file(file))
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = file.with_name(f"{file.stem}-0000{number}-of-00002.safetensors")
        save_file({name: tensors[name] for name in part}, shard)
    file.unlink()


def add_variant(base: Path) -> None:
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_suffix(".fp16.safetensors"))


CHANGES = {
    "the last number of the UNet": (
        lambda base: flip_last_bit(base / "unet" / "diffusion_pytorch_model.safetensors"),
        {"unet"},
    ),
    "a token's embedding": (change_token, {"text_encoder"}),
    "two words of a tokenizer": (swap_ids, {"text_encoder_2"}),
    "an encoder's configuration": (
        lambda base: flip_last_bit(base / "text_encoder" / "config.json"),
        {"text_encoder"},
    ),
    "the last number of the VAE": (
        lambda base: flip_last_bit(base / "vae" / "diffusion_pytorch_model.safetensors"),
        {"vae"},
    ),
    "a file for each half": (split, {"unet"}),
    "files that decide nothing": (lambda base: (base / "README.md").write_text("a card"), set()),
    "another variant beside it": (add_variant, set()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_folder_changes_its_parts_digests(name, tiny_base, tmp_path):
    """A copy of the folder has the same digests."""
    change, changed = CHANGES[name]
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    digests = partial(hash_parts, facts=SDXL, parts=PARTS, caches=tmp_path / "caches")
    before = digests(Base.find(tiny_base))
    assert before == digests(Base.find(base)) and len(set(before.values())) == len(PARTS)
    change(base)
    after = digests(Base.find(base))
    assert {part for part in PARTS if before[part] != after[part]} == changed


def test_a_shard_that_changed_is_another_denoiser(tiny_base, tmp_path):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    split(base)
    digests = []
    for _ in range(2):
        digests.append(hash_parts(Base.find(base), SDXL, ["unet"], tmp_path))
        flip_last_bit(base / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors")
    assert digests[0] != digests[1]


def test_a_fetched_snapshot_has_the_digests_of_the_folder(tiny_base, tmp_path):
    """The files of a snapshot are links into a folder of blobs."""
    base = Base.find("owner/model", cache_dir=str(tmp_path))
    assert base.folder is None and hash_parts(base, SDXL, PARTS, tmp_path) == {}
    model = tmp_path / "models--owner--model"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    (model / "blobs").mkdir()
    files = [file for file in tiny_base.rglob("*") if file.is_file()]
    for number, file in enumerate(files):
        link = model / "snapshots" / COMMIT / file.relative_to(tiny_base)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(shutil.copy(file, model / "blobs" / str(number)))
    digests = hash_parts(base, SDXL, PARTS, tmp_path)
    assert digests == hash_parts(Base.find(tiny_base), SDXL, PARTS, tmp_path)


def test_a_unets_single_file_decides_all_parts(tiny_base, tmp_path):
    file = save_single_file(load.load_pipeline(tiny_base), tmp_path / "model.safetensors")
    digests = partial(hash_parts, facts=SDXL, parts=PARTS, caches=tmp_path)
    alone = digests(Base.find(file))
    shutil.copytree(tiny_base, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    first = digests(Base.find(file))
    assert first["unet"] == alone["unet"] and list(first) == list(PARTS)
    swap_ids(tmp_path / "model")
    second = digests(Base.find(file))
    assert [part for part in PARTS if first[part] != second[part]] == ["text_encoder_2"]
    flip_last_bit(file)
    assert not {*digests(Base.find(file)).values()} & {*second.values()}

    # Another VAE is told by its own files.
    with_vae = digests(Base.find(file, vae=str(tiny_base / "vae")))
    assert with_vae["vae"] == digests(Base.find(tiny_base))["vae"]


def test_a_transformers_file_decides_the_transformer_alone(tmp_path):
    pipeline = tiny_pipeline("z_image", tmp_path / "files")
    pipeline.save_pretrained(tmp_path / "model")
    (weights,) = (tmp_path / "model" / "transformer").glob("*.safetensors")
    file = Path(shutil.move(weights, tmp_path / "model.safetensors"))
    parts = ("transformer", "text_encoder", "vae")
    base = Base.find(file)
    first = hash_parts(base, Z_IMAGE, parts, tmp_path)
    assert list(first) == list(parts)
    flip_last_bit(file)
    flip_last_bit(tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors")
    second = hash_parts(base, Z_IMAGE, parts, tmp_path)
    assert [part for part in parts if first[part] == second[part]] == ["text_encoder"]
