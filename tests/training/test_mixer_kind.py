"""A kind of mixer is a name and a start: flag, page, training, files and their descriptions know it by these."""

import gradio as gr
import pytest
import torch
from safetensors import safe_open

from dreambooth_moslora.adapters.describe import describe
from dreambooth_moslora.adapters.metadata import AdapterMetadata
from dreambooth_moslora.adapters.mixer import STARTS
from dreambooth_moslora.adapters.raw_file import read_raw
from dreambooth_moslora.cli.train import parse_train_config
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RAW_NAME
from dreambooth_moslora.settings.table import MIXERS
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.ui.train import train_widgets
from dreambooth_moslora.ui.train_form import TrainForm
from tests.helpers.tiny_training import paint_photos, tiny_config


@pytest.fixture
def reversed_kind(monkeypatch):
    monkeypatch.setitem(STARTS, "reversed", lambda mixer, _: mixer.copy_(torch.eye(len(mixer)).flip(0)))
    MIXERS.append("reversed")
    yield "reversed"
    MIXERS.remove("reversed")


def test_flag_page_training_files_and_descriptions_know_a_new_mixer(reversed_kind, tiny_base, tmp_path):
    flags = ["--mixer", "reversed", "--instance_data_dir", "p", "--instance_prompt", "a sks dog", "--output_dir", "run"]
    assert parse_train_config([*flags, "--pretrained_model_name_or_path", "toy"]).mixer == "reversed"
    with gr.Blocks():
        widgets, _ = train_widgets("toy", TrainForm)
    assert "reversed" in [value for _, value in widgets["mixer"].choices]
    photos = paint_photos(tmp_path / "photos")
    train(tiny_config(tiny_base, photos, tmp_path / "run", mixer="reversed", learning_rate=1e-6, max_train_steps=1))
    tensors, metadata = read_raw(tmp_path / "run" / "last" / RAW_NAME)
    mixers = [tensor for key, tensor in tensors.items() if key.endswith(".mixer")]
    assert mixers and all(torch.allclose(mixer, torch.eye(len(mixer)).flip(0), atol=1e-4) for mixer in mixers)
    with safe_open(tmp_path / "run" / PUBLISHED_NAME, "pt") as file:
        told = AdapterMetadata.from_json(file.metadata()["moslora"])
    assert metadata.mixer == told.mixer == "reversed"
    assert describe(tmp_path / "run" / PUBLISHED_NAME)["mixer"] == "reversed, folded"


def test_a_start_is_offered_and_what_is_offered_has_a_start():
    assert set(STARTS) == set(MIXERS) - {"none"} | {"zero"}
