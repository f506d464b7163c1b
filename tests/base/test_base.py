"""`Base`: what it says of each kind of base by its files alone, and that it reads each fact
once."""

import json
import pickle
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import save_file

from dreambooth_moslora.base import model_files
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings.family_facts import get_facts
from dreambooth_moslora.settings.toy_bases import TOY_FOLDERS
from dreambooth_moslora.settings.train_config import TrainConfig
from tests.helpers.tiny import RESOLUTION_PX

SDXL, SD1, FLUX = (
    get_facts(name)
    for name in ("StableDiffusionXLPipeline", "StableDiffusionPipeline", "FluxPipeline")
)
UNET = "unet/diffusion_pytorch_model.safetensors"
COMMIT = "0" * 40


@pytest.fixture(scope="module")
def world(tiny_base, tmp_path_factory):
    """Bases of each kind: folders, files and the hub's cache."""
    world = tmp_path_factory.mktemp("world")
    for name in ("damaged", "partial", "foreign"):
        shutil.copytree(tiny_base, world / name)
    (world / "damaged" / UNET).write_bytes(b"")
    shutil.rmtree(world / "partial" / "tokenizer")
    (world / "foreign" / model_files.INDEX_NAME).write_text(
        json.dumps({"_class_name": "PixArtAlphaPipeline"})
    )
    save_file({SD1.marker_tensor: torch.zeros(2, 3)}, world / "one.safetensors")
    (world / "noise.safetensors").write_bytes(b"noise")
    model = world / "models--owner--here"
    shutil.copytree(tiny_base, model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return world


KNOWN, ELSEWHERE = (
    "black-forest-labs/FLUX.1-dev",
    "as HF_HUB_OFFLINE is set: give the folder of a base, or a .safetensors file",
)
TOY_FOLDER = TOY_FOLDERS["toy"]
# fmt: off
# name, source, has a local folder, family or refusal, resolution_px, refusal, why unreachable
ROWS = [
    ("toy", "folder", True, SDXL, 128, None, None),
    (str(TOY_FOLDER), "folder", True, SDXL, 128, None, None),
    ("{tiny}", "folder", True, SDXL, RESOLUTION_PX, None, None),
    ("{world}/one.safetensors", "file", False, SD1, 512, None, None),
    ("owner/here", "hub", True, SDXL, RESOLUTION_PX, None, None),
    ("owner/elsewhere", "hub", False, None, 1024, None, ELSEWHERE),
    (KNOWN, "hub", False, FLUX, 1024, None, ELSEWHERE),
    ("{world}/damaged", "folder", True, SDXL, RESOLUTION_PX, "damaged, cut short", None),
    ("{world}/partial", "folder", True, SDXL, RESOLUTION_PX, "tokenizer is missing", None),
    ("{world}/foreign", "folder", True, "PixArtAlphaPipeline cannot be trained", RESOLUTION_PX,
        "PixArtAlphaPipeline cannot be trained", None),
]
# fmt: on


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_base_states_its_facts(row, world, tiny_base):
    name, source, is_here, family, side, refusal, unreachable = row
    name = name.format(world=world, tiny=tiny_base)
    settings = {"pretrained_model_name_or_path": name, "cache_dir": str(world)}
    base = Base.of(settings)
    assert base == Base.of(TrainConfig(**settings)) == Base.find(name, cache_dir=str(world))
    assert Base.find(base) is base and hash(base) == hash(pickle.loads(pickle.dumps(base)))
    assert (base.name, base.source, base.is_toy) == (name, source, "toy" in name)
    assert (base.folder is not None, base.resolution_px) == (is_here, side)
    if refusal is None:
        assert base.guidance == (2.5 if base.is_toy else (base.facts or SDXL).guidance)
    if isinstance(family, str):
        with pytest.raises(UserError, match=family):
            _ = base.facts
    else:
        assert base.facts is family
    with pytest.raises(UserError, match=refusal) if refusal else nullcontext():
        base.check()
    if unreachable:
        assert unreachable in base.unreachable and base.index is None
    else:
        assert base.unreachable is None


NO_BASE = {
    "{world}": "it has no model_index.json",
    "{world}/noise.safetensors": "is damaged, cut short or not a safetensors file",
    "{world}/damaged/model_index.json": "neither a diffusers folder nor a .safetensors checkpoint",
    "./nowhere": "does not exist: give a diffusers folder, a .safetensors file or a hub id",
}


@pytest.mark.parametrize("name", NO_BASE)
def test_a_name_of_no_base_is_refused_in_one_line(name, world):
    with pytest.raises(UserError, match=NO_BASE[name]) as error:
        Base.find(name.format(world=world))
    assert "\n" not in str(error.value)


def test_shapes_are_read_once_from_the_files(tiny_base, tmp_path, monkeypatch):
    opened, shapes_in = [], model_files.read_shapes
    monkeypatch.setattr(
        model_files, "read_shapes", lambda path: opened.append(path) or shapes_in(path)
    )
    base = Base.find(tiny_base)
    base.check()
    base.check()
    assert base.shapes == {
        part: model_files.read_folder_shapes(tiny_base / part)
        for part in ("unet", *SDXL.encoders, "vae")
    }
    assert len(opened) == 2 * len(set(opened))  # the second time by the test itself
    assert 0 < base.weights_gib < 0.1


def test_a_moved_run_finds_its_base_in_the_default_cache(tmp_path):
    cache, missing = str(tmp_path), str(tmp_path / "gone")
    config = {"pretrained_model_name_or_path": "owner/model", "revision": "v1", "variant": "fp16"}
    for cache_dir, expected in ((cache, cache), (missing, None)):
        base = Base.of_run(TrainConfig(**config, cache_dir=cache_dir))
        assert base == Base.find("owner/model", revision="v1", cache_dir=expected)


def test_the_facts_of_a_base_need_no_torch():
    code = "import sys; from dreambooth_moslora.base.base import Base; Base.find('toy').check()"
    code += "; print({'torch', 'diffusers'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
