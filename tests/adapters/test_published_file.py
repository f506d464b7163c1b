"""Published files: proved, in full fp32, refused when broken; and the mistakes that must not pass."""

import json
from functools import partial

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.fold_table import BOUND, loaded_by_diffusers, measure
from benchmarks.sdxl_structure import count
from dreambooth_moslora.adapters import moslora, proof, published_file
from dreambooth_moslora.adapters.describe import describe, reduce_layers
from dreambooth_moslora.adapters.kohya_file import kohya_name
from dreambooth_moslora.adapters.lora_file import check_fits, read_adapter
from dreambooth_moslora.adapters.metadata import AdapterMetadata
from dreambooth_moslora.adapters.mixer import LowRank, MixedLowRank
from dreambooth_moslora.adapters.moslora import MoSLoraConfig, adapter_layers, adapter_parameters, inject, set_scale
from dreambooth_moslora.adapters.published_file import load_published, publish
from dreambooth_moslora.adapters.raw_file import read_tensors, save_raw
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RAW_NAME
from tests.helpers.live_adapters import CONVOLUTIONS, facts_of, live, shake
from tests.helpers.tiny import tiny_unet
from tests.helpers.tiny_families import tiny_pipeline

KOHYA = "dog.kohya.safetensors"


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        ("orthogonal", "alpha ≠ r"),
        ("orthogonal", "rank pattern"),
        ("identity", "rsLoRA"),
        ("kaiming", "DoRA"),
        ("butterfly", "alpha = r"),
        ("none", "rank pattern"),
    ],
)
def test_an_untouched_diffusers_computes_the_live_output(kind, variant, tmp_path):
    assert max(measure(kind, variant, tmp_path).values()) <= BOUND


def published(components, folder, *arguments, **options):
    return publish(components, folder, "dog", facts_of(components), *arguments, **options)


def header_of(file) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("kind", ["orthogonal", "none"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"conv1": 2}}], ids=str)
def test_an_untouched_diffusers_computes_the_live_output_of_convolutions(kind, options, tmp_path):
    components, generator = live(mixer=kind, target_modules=CONVOLUTIONS, **options), torch.Generator().manual_seed(4)
    found = published(components, tmp_path)
    assert found.max_relative_difference < 1e-6
    words, text, latents = (torch.randn(s, generator=generator) for s in ((1, 7, 48), (1, 32), (1, 4, 8, 8)))
    added = {"text_embeds": text, "time_ids": torch.zeros(1, 6)}
    for file in found.files:
        nets = loaded_by_diffusers(tiny_unet(), tmp_path / file), components["unet"], tiny_unet()
        with torch.no_grad():
            seen, wanted, bare = (net.eval()(latents, 300, words, added_cond_kwargs=added).sample for net in nets)
        assert (seen - wanted).norm() <= BOUND * (wanted - bare).norm()


def test_the_files_hold_kernels_under_the_names_that_others_know(tmp_path):
    """The same whether pictures or channels come first in memory. A lower rank keeps the share that was asked for."""
    components = live(target_modules=CONVOLUTIONS)
    published(components, tmp_path)
    path = next(p for p in adapter_layers(components["unet"]) if p.endswith("conv1"))
    diffusers, kohya = (load_file(tmp_path / name) for name in (PUBLISHED_NAME, KOHYA))
    down, up = diffusers[f"unet.{path}.lora_A.weight"], diffusers[f"unet.{path}.lora_B.weight"]
    assert down.shape[2:] == (3, 3) and up.shape[2:] == (1, 1)
    assert torch.equal(kohya[f"{kohya_name('unet', path)}.lora_down.weight"], down)
    assert torch.equal(kohya[f"{kohya_name('unet', path)}.lora_up.weight"], up)
    components["unet"].to(memory_format=torch.channels_last)
    published(components, tmp_path / "b")
    again = load_file(tmp_path / "b" / PUBLISHED_NAME)
    assert all(torch.equal(diffusers[key], again[key]) for key in diffusers)
    smaller = published(components, tmp_path, keep=0.9)
    assert 0.9 <= smaller.kept < 1 and smaller.rank_sum < 4 * smaller.projections
    assert smaller.max_relative_difference < 1e-6
    described = describe(tmp_path / PUBLISHED_NAME)
    assert len(described["ranks"]) > 1 and described["effective_rank_median"] > 1


def test_the_proof_names_its_files_and_is_near(dog):
    folder, _, found = dog
    assert found.files == (PUBLISHED_NAME, KOHYA) and all((folder / f).is_file() for f in found.files)
    assert 0 < found.max_relative_difference < 1e-6 and found.projections == 112
    assert json.loads(json.dumps(found.to_dict()))["bound"] == 1e-5
    assert not list(folder.glob(".*")), "scratch is left behind"
    sdxl = count(4)
    assert (sdxl["projections"], round(sdxl["a_and_b"], 2), round(sdxl["mixers"], 3)) == (560, 5.81, 0.009)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_of_the_first_steps_keep_their_bound(dtype, options, tmp_path):
    """B as small as the first optimizer steps leave it: fp16 alone would underflow, and W·x drowns B·M·A·x."""
    components = live(target_modules=["to_q", "to_k"], **options)
    for name, parameter in adapter_parameters(components["unet"]):
        if name.endswith("lora_B.up"):
            parameter.data.mul_(1e-6)
    found = published(components, tmp_path, dtype)
    assert 0 < found.max_relative_difference < proof.BOUNDS[dtype]
    types = {t.dtype for k, t in load_file(tmp_path / PUBLISHED_NAME).items() if ".lora_magnitude" not in k}
    assert types == {dtype}


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"to_k": 2, "attn1.to_v": 6}, "alpha_pattern": {"to_q": 3}}]
)
def test_the_header_of_a_folded_file_says_alpha_equal_to_the_rank(options, tmp_path):
    """Matrices of lower ranks are filled up with zeros."""
    components, rank = live(**options), 6 if "rank_pattern" in options else 4
    assert facts_of(components).alpha == 11
    published(components, tmp_path)
    for name in (PUBLISHED_NAME, KOHYA):
        told = AdapterMetadata.from_json(header_of(tmp_path / name)["moslora"])
        assert (told.rank, told.alpha, told.use_rslora) == (4, 4, False)
    tensors = load_file(tmp_path / PUBLISHED_NAME)
    assert {tensor.shape[0] for key, tensor in tensors.items() if ".lora_A." in key} == {rank}


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "rank_pattern": {"attn.to_k": 2}}, {"use_dora": True}], ids=str
)
@pytest.mark.parametrize("keep", [1.0, 0.8])
def test_a_transformer_s_file_is_right_with_the_settings_in_its_header_and_without_them(options, keep, tmp_path):
    """diffusers reads the settings, ComfyUI takes alpha to be the rank, and --lora_alpha is neither."""
    pipeline, components = tiny_pipeline("flux", tmp_path / "files"), {}
    for name, targets in (("transformer", ["attn.to_q", "attn.to_k"]), ("text_encoder", ["q_proj", "v_proj"])):
        components[name] = inject(
            getattr(pipeline, name), MoSLoraConfig(r=4, lora_alpha=11, target_modules=targets, **options)
        )
        shake(components[name])
    published(components, tmp_path, keep=keep)
    tensors, header = read_tensors(tmp_path / PUBLISHED_NAME)
    settings = json.loads(header.pop("lora_adapter_metadata"))
    assert settings["transformer.lora_alpha"] == settings["transformer.r"] and len(settings) == 16
    assert bool(settings["transformer.rank_pattern"]) == (keep < 1) and "text_encoder.target_modules" in settings
    (tmp_path / "bare").mkdir()
    save_file(tensors, tmp_path / "bare" / "x.safetensors", header)
    with_settings = proof.stock_layers(tmp_path / PUBLISHED_NAME, components)
    without = proof.stock_layers(tmp_path / "bare" / "x.safetensors", components)
    for path, layer in with_settings.items():
        assert torch.equal(proof.delta(layer, proof.STOCK), proof.delta(without[path], proof.STOCK))
    pipeline = tiny_pipeline("flux", tmp_path / "again")
    check_fits(read_adapter(tmp_path / PUBLISHED_NAME, pipeline), pipeline, "flux")


def test_the_scale_of_the_moment_is_not_published(tmp_path):
    components = live()
    wanted = published(components, tmp_path / "a")
    set_scale(components["unet"], 0.1)
    published(components, tmp_path / "b")
    files = [load_file(tmp_path / f / PUBLISHED_NAME) for f in "ab"]
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    assert wanted.max_relative_difference < 1e-6
    layer = next(iter(adapter_layers(components["unet"]).values()))
    assert layer.scaling["default"] == pytest.approx(0.1 * 11 / 4)


def swapped(real, *arguments):
    def other(key):
        return key.replace(".lora_A.", ".?.").replace(".lora_B.", ".lora_A.").replace(".?.", ".lora_B.")

    return {other(k): t.T.contiguous() for k, t in real(*arguments).items()}


DIFFERS = r"differs from the live adapter by \d"
NO_MIXER = (MixedLowRank, "fold", lambda real, m: LowRank(m.down.detach().clone(), (m.scale * m.up).detach()))
NO_ALPHA = (moslora, "nominal_scale", lambda real, *_: 1.0)
KOHYA_ALPHA = (
    published_file,
    "kohya_tensors",
    lambda real, *all: {k: 2 * t if k.endswith(".alpha") else t for k, t in real(*all).items()},
)
SWAPPED = (published_file, "published_tensors", swapped)
SKIPPED = (published_file, "fold", lambda real, *all: dict(list(real(*all).items())[:-1]))


@pytest.mark.parametrize(
    ("mistake", "options", "keep", "said"),
    [
        (NO_MIXER, {}, 1.0, DIFFERS),
        (NO_ALPHA, {}, 1.0, DIFFERS),
        (KOHYA_ALPHA, {}, 1.0, DIFFERS),
        (SWAPPED, {}, 1.0, DIFFERS),
        (SWAPPED, {"target_modules": ["attn2.to_k"]}, 1.0, "the stock loader refuses it"),  # it is not square
        (SKIPPED, {}, 1.0, "adapts other modules"),
        (NO_MIXER, {}, 0.99, DIFFERS + ".*keep=0.99 allows 1.00e-01"),
        (NO_ALPHA, {}, 0.99, DIFFERS + ".*keep=0.99 allows 1.00e-01"),
    ],
)
def test_a_mistake_in_the_export_is_caught_by_the_proof_and_nothing_is_left(
    mistake, options, keep, said, monkeypatch, tmp_path
):
    owner, name, wrong = mistake
    components = live(**{"target_modules": ["attn1.to_q", "attn1.to_k"]} | options)
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: wrong(real, *arguments))
    with pytest.raises(UserError, match=said):
        published(components, tmp_path, keep=keep)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\nb", "a\udcff"])
def test_a_name_that_is_no_file_name_is_refused(name, tmp_path):
    with pytest.raises(UserError, match="cannot be part of a file's name"):
        publish(live(target_modules=["attn1.to_q"]), tmp_path, name, None)


def test_every_kohya_alpha_is_the_rank_and_every_module_is_there(dog):
    folder, components, _ = dog
    tensors = load_file(folder / KOHYA)
    names = {key.split(".")[0] for key in tensors}
    assert len(names) == sum(len(adapter_layers(m)) for m in components.values())
    for name in names:
        assert tensors[f"{name}.alpha"] == tensors[f"{name}.lora_down.weight"].shape[0] == 4
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0" in names
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in names
    assert "lora_te2_text_model_encoder_layers_0_self_attn_q_proj" in names


def test_the_kohya_header_says_what_the_tools_show(dog):
    """And no file tells where it was made."""
    header = header_of(dog[0] / KOHYA)
    assert header["modelspec.title"] == header["ss_output_name"] == "dog"
    assert header["modelspec.trigger_phrase"] == "sks dog" and header["modelspec.architecture"].endswith("/lora")
    assert header["ss_network_dim"] == header["ss_network_alpha"] == "4"
    assert header["modelspec.resolution"] == "1024x1024"
    assert facts_of(dog[1], base_id=dog[0] / "private" / "toy-sdxl").base_id == "toy-sdxl"
    for file in (RAW_NAME, PUBLISHED_NAME, KOHYA):
        text = json.dumps(header_of(dog[0] / file))
        assert not any(word in text for word in ("/tmp", "/root", "/home", "ss_dataset", "ss_tag", str(dog[0].parent)))


def test_nan_and_merged_adapters_are_not_saved(tmp_path):
    """NaN is named before a rank reduction stumbles over it. Nor is PEFT's own DoRA on a convolution."""
    components = live(target_modules=["attn1.to_q"])
    layer = next(iter(adapter_layers(components["unet"]).values()))
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["conv1"], use_dora=True), "default")
    facts, folder = facts_of(components), tmp_path / "none"

    def refused(said, components):
        for save in (
            partial(save_raw, components, folder / RAW_NAME, facts),
            partial(publish, components, folder, "dog", facts),
            partial(publish, components, folder, "dog", facts, keep=0.9),
        ):
            with pytest.raises(UserError, match=said):
                save()

    refused("conv1 is a convolution with DoRA, which cannot be saved here", {"unet": unet})
    layer.merge()
    with pytest.raises(UserError, match="merged into the base"):
        publish(components, folder, "dog", facts)
    layer.unmerge()
    for value in (float("inf"), float("nan")):
        layer.lora_A["default"].weight.data[0, 0] = value
        refused("NaN or infinite", components)
    assert not folder.exists() or not list(folder.iterdir())


def test_rank_reduction_is_the_best_there_is():
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(20, 8, generator=generator), torch.randn(8, 30, generator=generator)
    sizes = torch.linalg.svdvals(up @ down)
    for rank in (1, 3, 8):
        share = float(sizes[:rank].square().sum() / sizes.square().sum())
        smaller = reduce_layers({"unet": {"to_q": LowRank(down, up)}}, share - 1e-6)[0]["unet"]["to_q"]
        assert len(smaller.down) == rank
        error = (smaller.up @ smaller.down - up @ down).norm()
        assert error == pytest.approx(float(sizes[rank:].square().sum().sqrt()), rel=1e-3, abs=1e-4)


def test_keep_publishes_smaller_files_that_are_proved_too(tmp_path):
    components = live()
    whole, smaller = published(components, tmp_path / "whole"), published(components, tmp_path / "small", keep=0.8)
    assert smaller.rank_sum < whole.rank_sum and 0.8 <= smaller.kept < 1 and smaller.max_relative_difference < 1e-6
    assert any("0.29" in note for note in smaller.notes)
    ranks = {t.shape[0] for k, t in load_file(tmp_path / "small" / PUBLISHED_NAME).items() if ".lora_A." in k}
    again = load_published(tmp_path / "small")[1]
    assert len(ranks) > 1 and again.rank in ranks and set(again.ranks.values()) | {again.rank} == ranks
    with pytest.raises(UserError, match=r"keep=1.5"):
        published(components, tmp_path / "no", keep=1.5)
    fresh = {"unet": inject(tiny_unet(), MoSLoraConfig(r=4, lora_alpha=4, target_modules=["to_q"]))}
    assert published(fresh, tmp_path / "fresh").max_relative_difference == 0, "it has not learnt yet"


COARSEST = {
    torch.backends.cuda.matmul: "tf32",
    torch.backends.cudnn.conv: "tf32",
    torch.backends.mkldnn.matmul: "bf16",
    torch.backends.mkldnn.conv: "bf16",
}


def precisions() -> list[str]:
    return [setting.fp32_precision for setting in COARSEST]


@pytest.fixture
def coarse():
    """Products of GPU and CPU as coarse as PyTorch lets them be. `monkeypatch` cannot put these back."""
    before = precisions()
    for setting, precision in COARSEST.items():
        setting.fp32_precision = precision
    yield
    for setting, precision in zip(COARSEST, before, strict=True):
        setting.fp32_precision = precision


@pytest.mark.parametrize("keep", [1.0, 0.9])
def test_every_comparison_is_in_full_fp32_and_the_settings_come_back(keep, coarse, monkeypatch, tmp_path):
    """Also after a refusal."""
    found, compare, components = [], proof.relative_difference, live()
    monkeypatch.setattr(proof, "relative_difference", lambda *two: found.append(precisions()) or compare(*two))
    published(components, tmp_path, keep=keep)
    assert found and all(each == ["ieee"] * 4 for each in found)
    assert precisions() == list(COARSEST.values())
    reduced = {name: torch.zeros(1) for name in proof.all_layers(components, "default")}
    with pytest.raises(UserError, match="reduced in rank"):
        proof.check_reduction(components, "default", reduced, keep=0.9)
    assert precisions() == list(COARSEST.values())


@pytest.fixture
def older_switches():
    """PyTorch raises on reading one of them where the newer settings contradict it."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    yield switches
    for switch, allowed in zip(switches, before, strict=True):
        switch.allow_tf32 = allowed


@pytest.mark.parametrize("allowed", [(True, True), (False, False), (True, False), (False, True)])
def test_the_older_switches_for_tf32_can_be_read_inside_and_afterwards(allowed, older_switches):
    for switch, value in zip(older_switches, allowed, strict=True):
        switch.allow_tf32 = value
    before = precisions()
    with proof.full_fp32():
        assert [switch.allow_tf32 for switch in older_switches] == [False, False]
        assert precisions() == ["ieee"] * 4
    assert tuple(switch.allow_tf32 for switch in older_switches) == allowed and precisions() == before
