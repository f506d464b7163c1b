"""Raw files: they come back bit for bit; what is broken, of another base or from a stranger gets one clear line, and
nothing that it names is built or run."""

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save

from benchmarks.fold_table import loaded_by_diffusers, small_unet
from dreambooth_moslora.adapters import raw_file
from dreambooth_moslora.adapters.describe import describe
from dreambooth_moslora.adapters.lora_file import fold_raw
from dreambooth_moslora.adapters.moslora import adapter_layers, fold
from dreambooth_moslora.adapters.raw_file import empty_model, load_raw, model_config, save_raw
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RAW_NAME
from tests.helpers.live_adapters import CONVOLUTIONS, facts_of, live, text_encoders
from tests.helpers.tiny import tiny_unet


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixer": "kaiming", "train_mixer": False, "use_rslora": True, "lora_dropout": 0.1},
        {"use_dora": True, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"attn1.to_q": 3}},
        {"mixer": "none"},
        {"target_modules": CONVOLUTIONS, "mixer": "kaiming"},
        {"target_modules": CONVOLUTIONS, "mixer": "none"},
    ],
)
def test_raw_files_come_back_bit_for_bit(options, tmp_path):
    components = live(with_text=not options, **options)
    save_raw(components, tmp_path / RAW_NAME, facts_of(components))
    again = {"unet": tiny_unet()} | (text_encoders() if not options else {})
    facts = load_raw(tmp_path / RAW_NAME, again)
    assert facts.trigger_words == ("sks dog",) and facts.class_word == "dog" and facts.versions["peft"]
    for name, model in components.items():
        one, two = model.state_dict(), again[name].state_dict()
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
        pairs = zip(adapter_layers(model).values(), adapter_layers(again[name]).values(), strict=True)
        assert all((a.scaling, a.r, [*a.lora_dropout]) == (b.scaling, b.r, [*b.lora_dropout]) for a, b in pairs)
        learnt = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (model, again[name])]
        assert learnt[0] == learnt[1]
    if "conv1" in options.get("target_modules", ()):
        folded, published = fold_raw(tmp_path / RAW_NAME), fold(components["unet"])
        for path, layer in published.items():
            assert torch.equal(folded[f"unet.{path}.lora_A.weight"], layer.down)
            assert torch.allclose(folded[f"unet.{path}.lora_B.weight"], layer.up, atol=1e-6)
        assert describe(tmp_path / RAW_NAME)["modules"] == {"unet": len(published)}


@pytest.mark.parametrize("mixer", ["orthogonal", "none"])
def test_a_stock_loader_refuses_a_raw_file(mixer, tmp_path):
    components = live(mixer=mixer)
    save_raw(components, tmp_path / RAW_NAME, facts_of(components))
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        loaded_by_diffusers(tiny_unet(), tmp_path / RAW_NAME)


BROKEN = {
    "truncated": (lambda whole, *_: whole[:-100], "truncated or not a safetensors file"),
    "empty": (lambda *_: struct.pack("<Q", 1 << 40), "truncated or not a safetensors file"),
    "pickled": (lambda _, tensors, header: pickle.dumps(tensors), "can run code"),
    "nan": (
        lambda _, tensors, header: save(
            {k: t * torch.nan if ".lora_A" in k else t for k, t in tensors.items()}, header
        ),
        "NaN or infinite values, first in",
    ),
    "half": (
        lambda _, tensors, header: save({k: t for k, t in tensors.items() if not k.endswith("to_q.mixer")}, header),
        "is not whole",
    ),
    "headless": (lambda _, tensors, header: save(tensors), "lost its header"),
    "newer": (lambda _, tensors, header: save(tensors | {"raw_format": torch.tensor([99])}, header), "newer"),
}


@pytest.mark.parametrize("how", [*BROKEN, "published", "absent"])
def test_broken_files_get_one_clear_line(how, dog, tmp_path):
    raw, file = dog[0] / RAW_NAME, tmp_path / "x.safetensors"
    said = {"published": "loads with load_lora_weights", "absent": "there is no file"}.get(how)
    if how == "published":
        file = dog[0] / PUBLISHED_NAME
    elif how in BROKEN:
        change, said = BROKEN[how]
        file.write_bytes(change(raw.read_bytes(), *raw_file.read_tensors(raw)))
    components = {"unet": tiny_unet()} | text_encoders()
    with pytest.raises(UserError, match=said) as caught:
        load_raw(file, components)
    assert "\n" not in str(caught.value) and not hasattr(components["unet"], "peft_config")


def test_another_base_is_named_with_both_sizes(dog, tmp_path):
    with pytest.raises(UserError, match=r"another base \(some/base\).*to_k of 16×16 \(out×in\), which is 64×64 here"):
        load_raw(dog[0] / RAW_NAME, {"unet": small_unet()} | text_encoders())
    with pytest.raises(UserError, match="also adapts text_encoder, text_encoder_2"):
        load_raw(dog[0] / RAW_NAME, {"unet": tiny_unet()})
    components, other = live(target_modules=["conv1"]), tiny_unet()
    save_raw(components, tmp_path / RAW_NAME, facts_of(components))
    for name, module in list(other.named_modules()):
        if name.endswith("conv1"):
            wider = torch.nn.Conv2d(module.in_channels, module.out_channels, 5, padding=2)
            other.get_submodule(name.rpartition(".")[0]).conv1 = wider
    with pytest.raises(UserError, match=r"(\d+×\d+)×3×3 \(out×in\), which is \1×5×5 here"):
        load_raw(tmp_path / RAW_NAME, {"unet": other})
    assert not hasattr(other, "peft_config")


@pytest.mark.parametrize("start", [b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"])
def test_a_header_as_long_as_a_pickles_first_bytes_is_no_pickle(start, tmp_path):
    path, weights = tmp_path / "a.safetensors", {"a": torch.ones(3)}
    bare = struct.unpack("<Q", save(weights, {"filler": ""})[:8])[0]
    wanted = int.from_bytes(start, "little")
    path.write_bytes(save(weights, {"filler": "x" * (wanted - bare)}))
    assert path.read_bytes()[:2] == start
    tensors, header = raw_file.read_tensors(path)
    assert torch.equal(tensors["a"], weights["a"]) and set(header["filler"]) == {"x"}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """The folder of a raw file."""
    folder, components = tmp_path_factory.mktemp("raw"), live(target_modules=["attn1.to_q"])
    save_raw(components, folder / RAW_NAME, facts_of(components))
    return folder


HOSTILE = {
    "rank 8": {"rank": 8},
    "rank in words": {"rank": "four"},
    "no scale": {"alpha": float("nan")},
    "an endless scale": {"alpha": 10**400},
    "alphas": {"alphas": {"unet.x": "y"}},
    "mixer": {"mixer": ["orthogonal"]},
    "no mixer": {"mixer": "none"},
    "dora": {"use_dora": True},
    "trigger words": {"trigger_words": 5},
    "versions": {"versions": ["1"]},
    # copy_ would repeat a single row
    "one row": lambda t: t[:1].clone(),
    "a vector": lambda t: t[:, 0].clone(),
    "three dimensions": lambda t: t[None].clone(),
    "five dimensions": lambda t: t[:, None, None, None].clone(),
    "whole numbers": lambda t: t.int(),
}


def with_facts(folder, path, tensors: dict | None = None, **facts):
    """A copy of the raw file with other tensors or facts."""
    own, header = raw_file.read_tensors(folder / RAW_NAME)
    path.write_bytes(save(tensors or own, {"moslora": json.dumps(json.loads(header["moslora"]) | facts)}))
    return path


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_facts_that_do_not_go_with_the_tensors_are_refused(change, raw, tmp_path):
    tensors = load_file(raw / RAW_NAME)
    if not isinstance(change, dict):
        key = next(key for key in tensors if key.endswith(".lora_A"))
        tensors[key], change = change(tensors[key]), {}
    file = with_facts(raw, tmp_path / "x.safetensors", tensors, **change)
    for read in (raw_file.read_raw, describe):
        with pytest.raises(UserError, match=r"is broken|has lost its header"):
            read(file)


@pytest.mark.parametrize("text", ["[]", "null", "5", "{", "{}", "[" * 100_000])
def test_a_header_that_is_no_object_is_refused(text, raw, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(save(load_file(raw / RAW_NAME), {"moslora": text}))
    with pytest.raises(UserError, match="has lost its header"):
        raw_file.read_raw(tmp_path / "x.safetensors")


@pytest.mark.parametrize("key", ["weird", "unet.weird", "vae.a.lora_A"])
def test_a_raw_file_holds_nothing_else(key, raw, tmp_path):
    tensors = load_file(raw / RAW_NAME) | {key: torch.ones(4, 4)}
    with pytest.raises(UserError, match="does not belong to an adapter"):
        raw_file.read_raw(with_facts(raw, tmp_path / "x.safetensors", tensors))


@pytest.mark.parametrize(
    "structure",
    [
        {"class": "utils", "config": {}},
        {"class": "AutoModel", "config": {}},
        {"class": "UNet2DConditionModel"},
        {"class": "UNet2DConditionModel", "config": {"block_out_channels": "x"}},
        {"class": "CLIPTextModel", "config": {"vocab_size": -3}},
    ],
)
def test_a_structure_from_a_file_builds_parts_of_sdxl_only(structure):
    with pytest.raises(UserError, match=r"is not a part of SDXL|cannot be built"):
        empty_model(structure)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("UNet2DConditionModel", {"layers_per_block": 3000}),
        ("UNet2DConditionModel", {"layers_per_block": [1, 1, 60], "transformer_layers_per_block": [[9], 1, 900]}),
        ("UNet2DConditionModel", {"down_block_types": ["DownBlock2D"] * 3000}),
        ("CLIPTextModel", {"num_hidden_layers": 10**400}),
    ],
)
def test_a_file_does_not_have_us_build_for_minutes(name, changes, monkeypatch):
    monkeypatch.setattr("dreambooth_moslora.adapters.raw_file.build", lambda *_: pytest.fail("it is built"))
    model = tiny_unet() if name.startswith("UNet") else text_encoders()["text_encoder"]
    with pytest.raises(UserError, match="more than 2000 layers"):
        empty_model({"class": name, "config": model_config(model)["config"] | changes})


def test_a_file_does_not_choose_the_attention_code():
    config = model_config(text_encoders()["text_encoder"])["config"]
    model = empty_model({"class": "CLIPTextModel", "config": config | {"attn_implementation": "somebody/kernel"}})
    assert model.config._attn_implementation != "somebody/kernel"


def test_equal_files_have_equal_bytes_whatever_the_order_of_their_metadata(tmp_path):
    names = [f"name {number}" for number in range(8)]
    for path, order in ((tmp_path / "a", names), (tmp_path / "b", names[::-1])):
        raw_file.write_file(path, {"x": torch.arange(3.0), "y": torch.ones(2, 2)}, {name: "ü\n" for name in order})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tensors, header = raw_file.read_tensors(tmp_path / "a")
    assert tensors["x"].tolist() == [0, 1, 2] and list(tensors) == ["x", "y"] and header["name 7"] == "ü\n"
