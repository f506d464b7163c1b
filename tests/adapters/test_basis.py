"""A frozen basis: its directions, what learns on it, subjects that are swapped on it, and where it is looked for."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth_moslora.adapters.basis import (
    Basis,
    FileBasis,
    Mixers,
    SvdBasis,
    SwappedMixers,
    freeze_basis,
    is_mixer_file,
    leading_directions,
    put_basis,
    read_mixers,
    write_mixers,
)
from dreambooth_moslora.adapters.describe import describe
from dreambooth_moslora.adapters.fast_linear import WorkingCopies, enable_fast_path
from dreambooth_moslora.adapters.lora_file import read_adapter
from dreambooth_moslora.adapters.metadata import AdapterMetadata
from dreambooth_moslora.adapters.moslora import (
    MoSLoraConfig,
    adapter_layers,
    adapter_parameters,
    fold,
    inject,
    matrices_of,
)
from dreambooth_moslora.adapters.raw_file import save_raw
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import MIXERS_NAME, RunDir
from dreambooth_moslora.generation.pipeline import MixersOnBases
from tests.adapters.test_fast_linear import unet_loss
from tests.helpers.live_adapters import facts_of
from tests.helpers.tiny import tiny_unet

NOTE = {"kind": "svd", "sha256": "ab" * 32, "file": ""}
LAYERS = ["to_q", "conv1"]


class OwnBasis:
    """The basis svd of a model in memory."""

    def __init__(self, unet):
        self.note = NOTE
        self.weights = {name: p.detach().clone() for name, p in unet.named_parameters()}

    def layer(self, path, rank):
        return leading_directions(self.weights[f"{path}.weight"], rank)


@pytest.fixture(scope="module")
def basis():
    return OwnBasis(tiny_unet())


def on_basis(basis, rank=4, seed=None, **options):
    """A UNet with the adapter on the basis; with a seed its mixers have moved."""
    unet = tiny_unet()
    inject(unet, MoSLoraConfig(**{"r": rank, "lora_alpha": rank, "target_modules": LAYERS, "mixer": "zero"} | options))
    put_basis(basis, unet)
    freeze_basis(unet)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, mixer in adapter_parameters(unet):
                mixer.normal_(std=0.1, generator=generator)
    return unet


def mixers_of(unet, folder, name="mixers.safetensors", **more):
    facts = facts_of({"unet": unet}, **more)
    path = folder / name
    write_mixers(path, unet, AdapterMetadata(**vars(facts) | {"basis": NOTE}))
    return path


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (6, 5, 3, 3)])
def test_the_directions_are_the_weights_leading_singular_vectors(shape):
    """Beyond a narrow weight they are zero."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    down, up = leading_directions(weight, 5)
    left, sizes, right = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
    wanted = left[:, :5] @ right[:5] * sizes[:5].mean()
    assert down.shape == (5, *shape[1:]) and up.shape == (shape[0], 5)
    assert torch.allclose((up.double() @ down.double().flatten(1)), wanted, atol=1e-6)
    assert all(torch.equal(one, other) for one, other in zip((down, up), leading_directions(weight, 5)))
    down, up = leading_directions(weight[:3], 5)
    assert not down[3:].any() and not up[:, 3:].any() and up[:, :3].any(0).all()
    assert not any(part.isnan().any() for part in leading_directions(torch.zeros(4, 6), 2))


def test_directions_of_a_weight_with_equal_rows_are_finite_in_half_precision():
    weight = torch.randn(24, 40).repeat_interleave(2, 0)
    for part in (*leading_directions(weight, 40), *leading_directions(weight.T, 40)):
        assert part.half().isfinite().all() and part.abs().max() < 10 * weight.abs().max()


def test_the_mixers_alone_learn_and_the_fast_path_gives_pefts_gradients(basis):
    slow, fast = on_basis(basis, seed=1), on_basis(basis, seed=1)
    names = [name for name, _ in adapter_parameters(slow)]
    assert names and all(name.endswith(".lora_B.mixer") for name in names)
    assert enable_fast_path(fast)
    for unet in (slow, fast):
        with WorkingCopies(unet).for_one_step() as copies:
            unet_loss(unet).backward()
            copies.collect()
    for (name, one), (_, other) in zip(adapter_parameters(slow), adapter_parameters(fast), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-7), name
    layers = adapter_layers(fast).values()
    assert all(layer.lora_A["default"].weight.grad is None for layer in layers)
    assert all(layer.lora_B["default"].up.grad is None for layer in layers)


def test_a_subject_from_its_file_computes_what_its_adapter_does(basis, tmp_path):
    """However small its mixers are; NaN is refused."""
    unet = on_basis(basis, seed=2, lora_alpha=11, rank_pattern={"conv1": 3})
    file = mixers_of(unet, tmp_path)
    mixers, count = read_mixers(file), sum(r**2 for r in read_mixers(file).ranks.values())
    assert is_mixer_file(file) and file.stat().st_size < 2 * count + 5000
    assert {3, 4} == set(mixers.ranks.values())
    twin = tiny_unet()
    swapped = SwappedMixers(twin, basis, mixers.ranks, "basis")
    assert not any(layer.delta.any() for layer in fold(twin, "basis").values())
    swapped.show([(mixers.values, 1.0)])
    wanted, found = fold(unet), fold(twin, "basis")
    assert wanted.keys() == found.keys()
    assert all(torch.dist(found[p].delta, wanted[p].delta) < 1e-3 * wanted[p].delta.norm() for p in wanted)
    live = [mixer for _, mixer in adapter_parameters(unet)]
    with torch.no_grad():
        for mixer in live:
            mixer.mul_(1e-9)
        small = 1e-9 * mixers.values
        assert torch.dist(read_mixers(mixers_of(unet, tmp_path)).values, small) < 1e-3 * small.norm()
        live[0][0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        mixers_of(unet, tmp_path)


def test_subjects_on_one_basis_are_summed_and_survive_a_move_of_the_unet(basis, tmp_path):
    dog, cat = (read_mixers(mixers_of(on_basis(basis, seed=seed), tmp_path, f"{seed}.safetensors")) for seed in (1, 2))
    assert dog.basis_key == cat.basis_key and dog.sha256 != cat.sha256
    unet = tiny_unet()
    swapped = SwappedMixers(unet, basis, dog.ranks, "basis")

    def held():
        parts = [matrices_of(layer, "basis").mixer.flatten() for layer in adapter_layers(unet, "basis").values()]
        return torch.cat(parts).double()

    swapped.show([(dog.values, 0.5), (cat.values, 2.0)])
    assert torch.allclose(held(), (0.5 * dog.values + 2 * cat.values).double())
    unet.double()
    swapped.show([(cat.values, 1.0)])
    assert torch.equal(held(), cat.values.double())


def test_a_wrong_header_is_said_in_one_line_and_other_readers_refuse_the_file(basis, tmp_path):
    file = mixers_of(on_basis(basis, seed=1), tmp_path)
    with pytest.raises(UserError, match="holds mixers alone, without their basis; give the LoRA file"):
        read_adapter(file, None)
    said = describe(file)
    assert said["kind"].startswith("mixers alone") and said["basis"] == "svd, sha256 abababababab"
    assert said["trigger_words"] == "sks dog" and set(said["ranks"]) == {"4"}
    header, tensors = read_mixers(file).header, load_file(file)
    wrong = {
        "lost its header": ({"exponent": "99999"}, {"layers": "[1]"}, {"moslora": "{}"}),
        "is broken": ({"layers": "[]"}, {"layers": '{"a": 1}'}, {"moslora": AdapterMetadata(4, 4.0).to_json()}),
    }
    for error, change in ((error, change) for error, changes in wrong.items() for change in changes):
        save_file(tensors, file, {**header, **change})
        with pytest.raises(UserError, match=error):
            read_mixers(file)
    (tmp_path / "not.safetensors").write_bytes(b"no")
    assert not is_mixer_file(tmp_path / "not.safetensors")


def test_a_raw_file_is_a_basis_for_its_own_layers_and_ranks(basis, tmp_path):
    unet, file = on_basis(basis, seed=1), tmp_path / "basis.safetensors"
    save_raw({"unet": unet}, file, facts_of({"unet": unet}))
    found = FileBasis(file)
    put_basis(found, twin := on_basis(basis, seed=2))
    own, there = ({p: matrices_of(x, "default") for p, x in adapter_layers(u).items()} for u in (unet, twin))
    assert all(torch.equal(own[p].down, there[p].down) and torch.equal(own[p].up, there[p].up) for p in own)
    assert not any(matrices.mixer.any() for matrices in there.values())
    narrow, twin, path = OwnBasis(tiny_unet()), tiny_unet(), next(iter(own))
    narrow.weights = {name: weight[:, 1:] for name, weight in narrow.weights.items() if weight.ndim > 1}
    for call, said in (
        (lambda: found.layer(path, 2), r"basis\.safetensors has rank 4 in .*, not 2"),
        (lambda: found.layer("nowhere", 4), r"basis\.safetensors has no layer nowhere"),
        (lambda: put_basis(narrow, on_basis(basis, seed=2)), "made for another base"),
        (lambda: SwappedMixers(twin, basis, {"nowhere": 4}, "basis"), "another base: it has no layer nowhere"),
        (lambda: SwappedMixers(twin, narrow, {path: 4}, "basis"), "made for another base"),
    ):
        with pytest.raises(UserError, match=said):
            call()
    assert not getattr(twin, "peft_config", {})


def test_the_basis_svd_is_of_the_files_on_the_disk(tiny_base):
    basis = SvdBasis(tiny_base)
    weights = load_file(tiny_base / "unet" / "diffusion_pytorch_model.safetensors")
    path = next(name for name in weights if name.endswith("attn1.to_q.weight")).removesuffix(".weight")
    wanted = leading_directions(weights[f"{path}.weight"], 3)
    assert all(torch.equal(one, other) for one, other in zip(basis.layer(path, 3), wanted))
    assert len(basis.note["sha256"]) == 64 and json.dumps(basis.note)
    with pytest.raises(UserError, match="needs a base in a diffusers folder"):
        SvdBasis(None)
    with pytest.raises(UserError, match=r"no nowhere\.weight"):
        basis.layer("nowhere", 3)


QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def mixers_on(basis: Basis) -> Mixers:
    metadata = AdapterMetadata(rank=2, alpha=2.0, basis=basis.note)
    return Mixers(MIXERS_NAME, "", torch.ones(4), {QUERY: 2}, metadata, {})


@pytest.fixture
def bases(tiny_base, tmp_path):
    """A pipeline's bases; its base is a copy of the tiny one."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    return MixersOnBases(SimpleNamespace(unet=tiny_unet(), config={"_name_or_path": str(base)}))


def test_mixers_of_a_variant_find_its_files_beside_the_plain_ones(bases, tmp_path):
    base, mixers_file = tmp_path / "base", tmp_path / MIXERS_NAME
    plain = base / "unet" / "diffusion_pytorch_model.safetensors"
    file = plain.with_suffix(".fp16.safetensors")
    save_file({f"{QUERY}.weight": load_file(plain)[f"{QUERY}.weight"].half()}, file)
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
    inject(unet, MoSLoraConfig(r=2, lora_alpha=2, target_modules=[QUERY]))
    save_raw({"unet": unet}, tmp_path / "toys_basis.safetensors", facts_of({"unet": unet}))
    mixers = mixers_on(FileBasis(tmp_path / "toys_basis.safetensors"))
    for folder in (run.path, run.best_dir):
        bases.prepare(mixers, folder / MIXERS_NAME)
        assert bases.show([(mixers, 1.0)]) == {mixers.basis_key}
        bases.forget(mixers.basis_key)
        bases.pipeline.unet.delete_adapters(mixers.basis_key)
    with pytest.raises(UserError, match="into the folder above, or name it with --basis"):
        bases.prepare(mixers, run.path / "deep" / MIXERS_NAME)
