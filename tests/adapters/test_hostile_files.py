"""Adapter files of somebody who means harm: the base stays what it is for everybody.

Each is refused in one line, or does no more than its LoRA.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dreambooth_moslora.adapters import lora_file as lora_format
from dreambooth_moslora.core import UserError
from tests.adapters.test_honest_files import loaded, save_published
from tests.generation.test_pipeline import differs, picture
from tests.helpers.tiny_adapters import base_bytes

QUERY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def settings(**changes) -> dict[str, str]:
    """The header in which diffusers keeps PEFT's settings, with some of them changed."""
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    own = {"r": 4, "lora_alpha": 4, "target_modules": targets} | changes
    return {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in own.items()})}


def with_part(key: str, tensor: torch.Tensor):
    return lambda state: (state | {key: tensor}, None)


def with_settings(**changes):
    return lambda state: (state, settings(**changes))


def reshaped(part: str, shape):
    return lambda state: (state | {f"{QUERY}.{part}": shape(state[f"{QUERY}.{part}"])}, None)


def deep(state):
    return reshaped("lora_A.weight", lambda t: t[:, :, None, None])(
        reshaped("lora_B.weight", lambda t: t[:, :, None, None])(state)[0]
    )


REFUSED = {
    "a weight of the base": with_part("unet.conv_out.weight", torch.ones(4, 8, 3, 3)),
    "a wrapped weight of the base": with_part(f"{QUERY}.base_layer.weight", torch.ones(16, 16)),
    "a wrapped bias": with_part(
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.base_layer.bias", torch.ones(16)
    ),
    "a weight of a text encoder": with_part("text_encoder.embeddings.token_embedding.weight", torch.ones(4, 16)),
    "a LoRA on a whole block": lambda state: (
        state | {f"unet.mid_block.attentions.0.lora_{x}.weight": torch.ones(32, 32) for x in "AB"},
        None,
    ),
    "a control LoRA": with_part("unet.lora_controlnet", torch.ones(1)),
    "LoKr": with_part(f"{QUERY}.lokr_w1", torch.ones(4, 4)),
    "a line break": with_part("unet.a\nb.lora_A.weight", torch.ones(4, 4)),
    "OLoRA": with_settings(init_lora_weights="olora"),
    "PiSSA": with_settings(init_lora_weights="pissa"),
    "fast PiSSA": with_settings(init_lora_weights="pissa_niter_1"),
    "an alpha by expression": with_settings(alpha_pattern={"(.*)to_q": 7}),
    "an alpha of no number": with_settings(lora_alpha=float("nan")),
    "an endless alpha": with_settings(lora_alpha=10**400),
    "an alpha in words": with_settings(lora_alpha="four"),
    "an alpha that is a list": with_settings(alpha_pattern={"to_q": [1]}),
    "alphas in a list": with_settings(alpha_pattern=["to_q"]),
    "a flag in words": with_settings(use_rslora="yes"),
    "DoRA without magnitudes": with_settings(use_dora=True),
    "settings in a list": lambda state: (state, {"lora_adapter_metadata": "[1]"}),
    "settings without a floor": lambda state: (state, {"lora_adapter_metadata": "[" * 100_000}),
    "four dimensions on a linear layer": deep,
    "a magnitude of another length": with_part(f"{QUERY}.lora_magnitude_vector", torch.ones(7)),
    "a bias of another length": with_part(f"{QUERY}.lora_B.bias", torch.ones(7)),
    "rank 0": lambda state: (
        state
        | {f"{QUERY}.lora_A.weight": state[f"{QUERY}.lora_A.weight"][:0]}
        | {f"{QUERY}.lora_B.weight": state[f"{QUERY}.lora_B.weight"][:, :0]},
        None,
    ),
    "whole numbers": reshaped("lora_A.weight", lambda t: t.int()),
    "eight bits": reshaped("lora_A.weight", lambda t: t.to(torch.float8_e4m3fn)),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_a_hostile_file_is_refused_in_one_line_and_nothing_has_changed(make, state, subject, tmp_path):
    tensors, header = make(state)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "x.safetensors", header)
    before = base_bytes(subject.pipeline)
    with pytest.raises(UserError) as error:
        subject.load_adapter(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert not subject.adapters and not any(subject.pipeline.get_list_adapters().values())
    assert base_bytes(subject.pipeline) == before


HARMLESS = {
    "targets by expression": {"target_modules": ".*to_q"},
    "ranks by expression": {"rank_pattern": {"(.*)to_q": 7}},
    "whole modules": {"modules_to_save": ["conv_out"]},
    "unknown settings": {"nobody": {"knows": ["this"]}},
    "an attack on a class": {"runtime_config": 3, "peft_type": "LOHA", "megatron_config": {"a": 1}},
}


@pytest.mark.parametrize("changes", HARMLESS.values(), ids=HARMLESS)
def test_other_settings_of_a_file_do_not_reach_peft(changes, state, subject, tmp_path):
    save_file(state, tmp_path / "plain.safetensors")
    save_file(state, tmp_path / "x.safetensors", settings(**changes))
    plain, bare = picture(loaded(subject, tmp_path / "plain.safetensors"), adapters=(("x", 1.0),)), picture(subject)
    before = base_bytes(subject.pipeline)
    subject.load_adapter(tmp_path / "x.safetensors", "settings")
    config = subject.pipeline.unet.peft_config[subject.adapters["settings"].key]
    assert isinstance(config.target_modules, set) and not config.rank_pattern and config.modules_to_save is None
    assert all(any(f"{name}." in key for key in state) for name in config.target_modules)
    assert np.array_equal(picture(subject, adapters=(("settings", 1.0),)), plain)
    assert np.array_equal(picture(subject), bare) and base_bytes(subject.pipeline) == before


def lora_in_lora(state):
    return state | {f"{QUERY}.base_layer.lora_{x}.weight": torch.ones(16, 16) for x in "AB"}, None


@pytest.mark.parametrize(
    "make", [REFUSED["a weight of the base"], REFUSED["a wrapped bias"], REFUSED["OLoRA"], lora_in_lora]
)
def test_a_refused_file_leaves_the_pictures_of_the_base_and_of_others_alone(make, state, subject, tmp_path):
    save_file(state, tmp_path / "good.safetensors")
    bare = picture(subject)
    good = picture(loaded(subject, tmp_path / "good.safetensors", "good"), adapters=(("good", 1.0),))
    tensors, header = make(state)
    save_file(tensors, tmp_path / "bad.safetensors", header)
    with pytest.raises(UserError):
        subject.load_adapter(tmp_path / "bad.safetensors")
    assert np.array_equal(picture(subject), bare)
    assert np.array_equal(picture(subject, adapters=(("good", 1.0),)), good)


def test_a_failure_half_way_takes_out_what_was_in(tiny_base, subject, tmp_path, monkeypatch):
    file = save_published(tiny_base, tmp_path)

    def fail(*_, **__):
        raise RuntimeError("no\nmemory")

    before, bare = base_bytes(subject.pipeline), picture(subject)
    with monkeypatch.context() as patch:
        patch.setattr(subject.pipeline, "load_lora_into_unet", fail)  # the text encoders come before it
        with pytest.raises(UserError, match="could not be put into the base: no memory"):
            subject.load_adapter(file)
    assert not subject.adapters and not any(subject.pipeline.get_list_adapters().values())
    assert base_bytes(subject.pipeline) == before and np.array_equal(picture(subject), bare)
    assert differs(picture(loaded(subject, file), adapters=(("x", 1.0),)), bare)


def test_a_file_with_more_alphas_than_any_trainer_writes_is_refused(state, subject, tmp_path, monkeypatch):
    save_file(state, tmp_path / "x.safetensors", settings(alpha_pattern={"to_q": 7}))
    monkeypatch.setattr(lora_format, "MOST_VALUES", 1)
    with pytest.raises(UserError, match="more than 1 different ranks or alphas"):
        subject.load_adapter(tmp_path / "x.safetensors")
