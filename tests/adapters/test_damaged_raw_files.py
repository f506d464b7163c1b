"""Raw files: they come back bit for bit, and what is broken or of another base gets one clear line."""

import pickle
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from benchmarks.fold_table import loaded_by_diffusers, small_unet
from dreambooth_moslora.adapters import raw_file
from dreambooth_moslora.adapters import raw_file as tensor_file
from dreambooth_moslora.adapters.moslora import adapter_layers
from dreambooth_moslora.adapters.raw_file import load_raw, save_raw
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RAW_NAME
from tests.helpers.live_adapters import facts_of, live, text_encoders
from tests.helpers.tiny import tiny_unet


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixer": "kaiming", "train_mixer": False, "use_rslora": True, "lora_dropout": 0.1},
        {"use_dora": True, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"attn1.to_q": 3}},
        {"mixer": "none"},
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
        assert all(
            a.scaling == b.scaling and a.r == b.r and a.lora_dropout.keys() == b.lora_dropout.keys() for a, b in pairs
        )
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            n for n, p in again[name].named_parameters() if p.requires_grad
        ]


@pytest.mark.parametrize("mixer", ["orthogonal", "none"])
def test_a_stock_loader_refuses_a_raw_file(mixer, tmp_path):
    components = live(mixer=mixer)
    save_raw(components, tmp_path / RAW_NAME, facts_of(components))
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        loaded_by_diffusers(tiny_unet(), tmp_path / RAW_NAME)


def spoil(folder, how: str):
    """A broken copy of the raw file."""
    whole, path = folder / RAW_NAME, folder / f"{how}.safetensors"
    tensors = load_file(whole)
    with safe_open(whole, "pt") as file:
        header = file.metadata()
    if how == "truncated":
        path.write_bytes(whole.read_bytes()[:-100])
    elif how == "pickled":
        path.write_bytes(pickle.dumps(tensors))
    elif how == "nan":
        next(t for k, t in tensors.items() if k.endswith("lora_A"))[0, 0] = float("nan")
        save_file(tensors, path, header)
    elif how == "half":
        save_file({k: t for k, t in tensors.items() if not k.endswith("to_q.mixer")}, path, header)
    elif how == "headless":
        save_file(tensors, path)
    elif how == "published":
        path.write_bytes((folder / PUBLISHED_NAME).read_bytes())
    elif how == "empty":
        path.write_bytes(struct.pack("<Q", 1 << 40))
    return path


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "truncated or not a safetensors file"),
        ("empty", "truncated or not a safetensors file"),
        ("pickled", "can run code"),
        ("nan", "NaN or infinite values, first in"),
        ("half", "is not whole"),
        ("headless", "lost its header"),
        ("published", "loads with load_lora_weights"),
        ("absent", "there is no file"),
    ],
)
def test_broken_files_get_one_clear_line(how, said, dog):
    components = {"unet": tiny_unet()} | text_encoders()
    with pytest.raises(UserError, match=said) as caught:
        load_raw(spoil(dog[0], how), components)
    assert "\n" not in str(caught.value) and not hasattr(components["unet"], "peft_config")


def test_another_base_is_named_with_both_sizes(dog):
    with pytest.raises(UserError, match=r"another base \(some/base\).*to_k of 16×16 \(out×in\), which is 64×64 here"):
        load_raw(dog[0] / RAW_NAME, {"unet": small_unet()} | text_encoders())
    with pytest.raises(UserError, match="also adapts text_encoder, text_encoder_2"):
        load_raw(dog[0] / RAW_NAME, {"unet": tiny_unet()})


def test_a_newer_raw_format_is_refused(tmp_path, dog):
    tensors = load_file(dog[0] / RAW_NAME) | {"raw_format": torch.tensor([99])}
    (tmp_path / "new.safetensors").write_bytes(save(tensors, {"moslora": "{}"}))
    with pytest.raises(UserError, match="newer"):
        raw_file.read_raw(tmp_path / "new.safetensors")


@pytest.mark.parametrize("start", [b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"])
def test_a_header_as_long_as_a_pickles_first_bytes_is_no_pickle(start, tmp_path):
    path, weights = tmp_path / "a.safetensors", {"a": torch.ones(3)}
    bare = struct.unpack("<Q", save(weights, {"filler": ""})[:8])[0]
    wanted = int.from_bytes(start, "little")
    path.write_bytes(save(weights, {"filler": "x" * (wanted - bare)}))
    assert path.read_bytes()[:2] == start
    tensors, header = tensor_file.read_tensors(path)
    assert torch.equal(tensors["a"], weights["a"]) and set(header["filler"]) == {"x"}
