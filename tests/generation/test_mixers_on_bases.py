"""Where the basis of a mixer file is looked for."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth_moslora.adapters.basis import Basis, FileBasis, Mixers, SvdBasis
from dreambooth_moslora.adapters.metadata import AdapterMetadata
from dreambooth_moslora.adapters.moslora import MoSLoraConfig, inject
from dreambooth_moslora.adapters.raw_file import save_raw
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import MIXERS_NAME, RunDir
from dreambooth_moslora.generation.pipeline import MixersOnBases
from tests.helpers.live_adapters import facts_of
from tests.helpers.tiny import tiny_unet

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def mixers_on(basis: Basis) -> Mixers:
    metadata = AdapterMetadata(rank=2, alpha=2.0, basis=basis.note)
    return Mixers(MIXERS_NAME, "", torch.ones(4), {LAYER: 2}, metadata, {})


@pytest.fixture
def bases(tiny_base, tmp_path):
    """A pipeline's bases; its base is a copy of the tiny one."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    return MixersOnBases(SimpleNamespace(unet=tiny_unet(), config={"_name_or_path": str(base)}))


def test_mixers_of_a_variant_find_its_files_beside_the_plain_ones(bases, tmp_path):
    base, mixers_file = tmp_path / "base", tmp_path / MIXERS_NAME
    plain = base / "unet" / "diffusion_pytorch_model.safetensors"
    file = plain.with_suffix(".fp16.safetensors")
    save_file({f"{LAYER}.weight": load_file(plain)[f"{LAYER}.weight"].half()}, file)
    of_variant, of_plain = (SvdBasis(base, variant) for variant in ("fp16", None))
    assert of_variant.note != of_plain.note
    mixers = [mixers_on(basis) for basis in (of_variant, of_plain)]
    for one in mixers:
        bases.prepare(one, mixers_file)
    assert bases.show((one, 1.0) for one in mixers) == {one.basis_key for one in mixers}
    file.unlink()
    bases.forget(mixers[0].basis_key)
    with pytest.raises(UserError, match=f"made for other weights: .* and this one's is {of_plain.note['sha256'][:12]}"):
        bases.prepare(mixers[0], mixers_file)


def test_the_best_steps_mixers_find_the_basis_above_the_run(bases, tmp_path):
    unet, run = tiny_unet(), RunDir(tmp_path / "run")
    inject(unet, MoSLoraConfig(r=2, lora_alpha=2, target_modules=[LAYER]))
    save_raw({"unet": unet}, tmp_path / "toys_basis.safetensors", facts_of({"unet": unet}))
    mixers = mixers_on(FileBasis(tmp_path / "toys_basis.safetensors"))
    for folder in (run.path, run.best_dir):
        bases.prepare(mixers, folder / MIXERS_NAME)
        assert bases.show([(mixers, 1.0)]) == {mixers.basis_key}
        bases.forget(mixers.basis_key)
        bases.pipeline.unet.delete_adapters(mixers.basis_key)
    with pytest.raises(UserError, match="into the folder above, or name it with --basis"):
        bases.prepare(mixers, run.path / "deep" / MIXERS_NAME)
