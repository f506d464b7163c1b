"""The mixers: how they start, what depends on them, who is refused one, and that a kind of mixer is
a name and a start: flag, page, training, files and their descriptions know it by these."""

import subprocess
import sys

import gradio as gr
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RAW_NAME
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora.describe import describe
from dreambooth_moslora.lora.metadata import AdapterMetadata
from dreambooth_moslora.lora.raw_file import read_raw
from dreambooth_moslora.method.mixer import INITIALIZERS, MixerLinear, build_initial_mixer
from dreambooth_moslora.method.moslora import (
    MoSLoraConfig,
    get_adapter_layers,
    list_adapter_parameters,
)
from dreambooth_moslora.settings.train_config import MIXERS
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.ui.train.screen import build_train_widgets
from tests.helpers.command_line import parse_train_config
from tests.helpers.tiny_training import paint_photos, tiny_config
from tests.method.test_moslora import Net, config


@pytest.mark.parametrize("kind", ["orthogonal", "identity", "butterfly"])
def test_the_mixers_start_as_they_are_named(kind):
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
    with pytest.raises(ValueError, match="'random'"):
        build_initial_mixer("random", 6, seed=0, path="x")


def test_mixers_depend_on_seed_and_place():
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
def test_peft_is_patched_only_from_the_first_config_with_a_mixer_on():
    run = [sys.executable, "-c", PATCH_STATE]
    output = subprocess.run(run, stdout=subprocess.PIPE, check=True).stdout
    assert output.decode().strip() == "[False, False, True]"


def test_what_cannot_carry_a_mixer_is_named_for_pefts_own_models_too():
    with pytest.raises(UserError, match="words is a Embedding"):
        get_peft_model(Net(), config(target_modules=["words"]))


@pytest.fixture
def reversed_kind(monkeypatch):
    monkeypatch.setitem(
        INITIALIZERS, "reversed", lambda mixer, _: mixer.copy_(torch.eye(len(mixer)).flip(0))
    )
    MIXERS.append("reversed")
    yield "reversed"
    MIXERS.remove("reversed")


def test_flag_page_training_files_and_descriptions_know_a_new_mixer(
    reversed_kind, tiny_base, tmp_path
):
    assert set(INITIALIZERS) == set(MIXERS) - {"none"}
    flags = [
        "--mixer",
        "reversed",
        "--instance_data_dir",
        "p",
        "--instance_prompt",
        "a sks dog",
        "--output_dir",
        "run",
    ]
    assert (
        parse_train_config([*flags, "--pretrained_model_name_or_path", "toy"]).mixer == "reversed"
    )
    with gr.Blocks():
        widgets, _ = build_train_widgets("toy")
    assert "reversed" in [value for _, value in widgets["mixer"].choices]
    changes = {"mixer": "reversed", "learning_rate": 1e-6, "max_train_steps": 1}
    train(tiny_config(tiny_base, paint_photos(tmp_path / "photos"), tmp_path / "run", **changes))
    tensors, metadata = read_raw(tmp_path / "run" / "last" / RAW_NAME)
    mixers = [tensor for key, tensor in tensors.items() if key.endswith(".mixer")]
    assert mixers and all(
        torch.allclose(mixer, torch.eye(len(mixer)).flip(0), atol=1e-4) for mixer in mixers
    )
    with safe_open(tmp_path / "run" / PUBLISHED_NAME, "pt") as file:
        published = AdapterMetadata.from_json(file.metadata()["moslora"])
    assert metadata.mixer == published.mixer == "reversed"
    assert describe(tmp_path / "run" / PUBLISHED_NAME)["mixer"] == "reversed, folded"
