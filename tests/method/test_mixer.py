"""The mixers: how they start, what they depend on, and which layers cannot carry one."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.method.mixer import INITIALIZERS, MixerLinear, build_initial_mixer
from dreambooth_moslora.method.moslora import (
    MoSLoraConfig,
    get_adapter_layers,
    list_adapter_parameters,
)
from dreambooth_moslora.settings.setting_rows import MIXERS
from tests.method.test_moslora import Net, config


@pytest.mark.parametrize("kind", ["orthogonal", "identity", "butterfly"])
def test_mixers_start_as_they_are_named(kind):
    start = build_initial_mixer(kind, 6, seed=1, path="a.b").double()
    halves = torch.eye(3).repeat(2, 2).double()
    expected = {
        "orthogonal": torch.eye(6).double(),
        "identity": torch.eye(6).double(),
        "butterfly": 2 * halves,
    }
    assert torch.allclose(start @ start.T, expected[kind], atol=1e-6)
    assert (kind == "orthogonal") == (not torch.equal(start, start.round()))
    kaiming = build_initial_mixer("kaiming", 64, seed=0, path="x")  # uniform within 1 / sqrt(r)
    assert 0.95 / 8 < kaiming.abs().max() <= 1 / 8 and abs(kaiming.std() - 1 / 8 / 3**0.5) < 0.005
    assert set(INITIALIZERS) == set(MIXERS) - {"none"}
    with pytest.raises(ValueError, match="'random'"):
        build_initial_mixer("random", 6, seed=0, path="x")


def test_mixers_depend_on_seed_and_path():
    first = build_initial_mixer("orthogonal", 4, seed=0, path="a")
    torch.manual_seed(77)
    state = torch.get_rng_state()
    assert torch.equal(first, build_initial_mixer("orthogonal", 4, seed=0, path="a"))
    assert torch.equal(state, torch.get_rng_state()), "a mixer must not shift the draws of A"
    assert not torch.equal(first, build_initial_mixer("orthogonal", 4, seed=1, path="a"))
    assert not torch.equal(first, build_initial_mixer("orthogonal", 4, seed=0, path="b"))


@pytest.mark.parametrize("first", [LoraConfig, MoSLoraConfig])
def test_a_second_adapter_of_a_peft_model_gets_its_mixer(first):
    model = get_peft_model(Net(), first(r=4, target_modules=["to_q"]))
    model.add_adapter("late", config(r=2))
    layers = get_adapter_layers(model, "late")
    assert all(isinstance(layer.lora_B["late"], MixerLinear) for layer in layers.values())
    assert {p.dtype for _, p in list_adapter_parameters(model, "late")} == {torch.float32}


PATCH_STATE = """
from peft.tuners.lora import LoraModel
before = LoraModel._create_and_replace
from dreambooth_moslora.method.moslora import MoSLoraConfig
is_patched = lambda: before != LoraModel._create_and_replace
states = [is_patched()]
MoSLoraConfig(mixer="none")
states.append(is_patched())
MoSLoraConfig()
print(states + [is_patched()])
"""


@pytest.mark.slow
def test_peft_is_patched_by_the_first_config_with_a_mixer():
    run = [sys.executable, "-c", PATCH_STATE]
    output = subprocess.run(run, stdout=subprocess.PIPE, check=True).stdout
    assert output.decode().strip() == "[False, False, True]"


def test_an_embedding_that_cannot_carry_a_mixer_is_named():
    with pytest.raises(UserError, match="words is a Embedding"):
        get_peft_model(Net(), config(target_modules=["words"]))
