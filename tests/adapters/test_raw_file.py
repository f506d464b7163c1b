"""Raw adapter files that somebody else has written: refused in one line, and nothing they name is built or run."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from dreambooth_moslora.adapters import raw_file
from dreambooth_moslora.adapters import raw_file as tensor_file
from dreambooth_moslora.adapters.raw_file import empty_model, model_config, save_raw
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import RAW_NAME
from tests.helpers.live_adapters import facts_of, live, text_encoders
from tests.helpers.tiny import tiny_unet


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
}


def with_facts(folder, path, tensors: dict | None = None, **facts):
    """A copy of the raw file with other tensors or facts."""
    with safe_open(folder / RAW_NAME, "pt") as file:
        stored = json.loads(file.metadata()["moslora"])
    path.write_bytes(save(tensors or load_file(folder / RAW_NAME), {"moslora": json.dumps(stored | facts)}))
    return path


@pytest.mark.parametrize("facts", HOSTILE.values(), ids=HOSTILE)
def test_facts_that_do_not_go_with_the_tensors_are_refused(facts, raw, tmp_path):
    with pytest.raises(UserError, match=r"is broken|has lost its header"):
        raw_file.read_raw(with_facts(raw, tmp_path / "x.safetensors", **facts))


@pytest.mark.parametrize("text", ["[]", "null", "5", "{", "{}", "[" * 100_000])
def test_a_header_that_is_no_object_is_refused(text, raw, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(save(load_file(raw / RAW_NAME), {"moslora": text}))
    with pytest.raises(UserError, match="has lost its header"):
        raw_file.read_raw(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[:1].clone(),  # copy_ would repeat the row
        lambda t: t[None].clone(),
        lambda t: t.int(),
    ],
)
def test_a_matrix_of_another_size_is_refused_and_never_stretched(change, raw, tmp_path):
    tensors = load_file(raw / RAW_NAME)
    key = next(key for key in tensors if key.endswith(".lora_A"))
    path = with_facts(raw, tmp_path / "x.safetensors", tensors | {key: change(tensors[key])})
    with pytest.raises(UserError, match="is broken"):
        raw_file.read_raw(path)


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
        tensor_file.write_file(path, {"x": torch.arange(3.0), "y": torch.ones(2, 2)}, {name: "ü\n" for name in order})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tensors, header = tensor_file.read_tensors(tmp_path / "a")
    assert tensors["x"].tolist() == [0, 1, 2] and list(tensors) == ["x", "y"] and header["name 7"] == "ü\n"
