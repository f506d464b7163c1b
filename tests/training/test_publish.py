"""What leaves the machine, and what a person sees: hub files, card, contact sheet, loss plot."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

from dreambooth_moslora.adapters.metadata import AdapterMetadata, dora_table
from dreambooth_moslora.adapters.proof import FileProof, Proof
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.events import StepDone
from dreambooth_moslora.disk.run_folder import SIGNATURE, pictures_named
from dreambooth_moslora.pictures import Row, draw_contact_sheet
from dreambooth_moslora.plan.checks import check_push
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training import model_card as hub
from dreambooth_moslora.training.model_card import CardFacts, model_card, public_files, push
from dreambooth_moslora.training.publish import draw_loss_plot, running_mean


def card(use_dora: bool = False, **changes) -> str:
    config = TrainConfig(instance_prompt='a photo of "sks": dog', learning_rate=1e-4, use_dora=use_dora)
    proof = Proof("fp32", 1e-5, 560, (FileProof("a.safetensors", 3e-7, 2e-7, "unet.x", "diffusers"),))
    facts = AdapterMetadata(rank=4, alpha=4.0, base_id="owner/base", trigger_words=("sks dog",))
    values = {"name": "dog", "step": 500, "max_train_steps": 500, "adapter": facts, "proof": proof}
    return model_card(config, CardFacts(**{**values, "images": (("image_0.png", 'a "sks": dog'),), **changes}))


def test_the_card_of_dora_says_by_program_what_its_kohya_file_is():
    assert "is the same adapter for ComfyUI" in card() and "DoRA" not in card()
    assert "the same adapter for" not in card(use_dora=True) and dora_table() in card(use_dora=True)


def test_the_card_s_snippet_loads_half_precision_in_old_and_new_diffusers():
    """0.29 and 0.33 ignore `dtype=` and load fp32."""
    assert "from_pretrained('owner/base', torch_dtype=torch.float16)" in card()


def test_only_the_adapter_its_card_and_its_pictures_are_pushed(tmp_path):
    public = ["README.md", "dog.kohya.safetensors", "image_0.png", "pytorch_lora_weights.safetensors"]
    private = [
        "contact_sheet.png",
        "train_config.json",
        "metrics.jsonl",
        "train.log",
        "samples/step_000000_0.png",
        "class_images/class_1_00000.png",
        "checkpoint-5/moslora_weights.safetensors",
        "earlier_run_1/dog.kohya.safetensors",
        "best/pytorch_lora_weights.safetensors",
    ]
    for name in [*public, *private]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert public_files(tmp_path) == public
    assert list(filter_repo_objects([*public, *private], allow_patterns=public_files(tmp_path))) == public


@pytest.mark.parametrize("name", ["dog[1]", "dog]", "a*b?", "[!d]og", "dog [of mine", "{dog}"])
def test_names_that_read_as_patterns_are_pushed_and_no_others(name, tmp_path, monkeypatch):
    asked = []

    class Hub:
        def __init__(self, token):
            self.create_repo = lambda *_, **__: SimpleNamespace(repo_id="owner/dog")
            self.upload_folder = lambda allow_patterns, **_: asked.extend(allow_patterns)

    monkeypatch.setattr(hub, "HfApi", Hub)
    (tmp_path / f"{name}.kohya.safetensors").touch()
    (tmp_path / "README.md").touch()
    others = ["dog1.kohya.safetensors", "axxbx.kohya.safetensors", "log.kohya.safetensors"]
    push(tmp_path, "owner/dog", None)
    found = filter_repo_objects([*public_files(tmp_path), *others], allow_patterns=asked)
    assert list(found) == public_files(tmp_path)


class Unreachable:
    """A hub behind a network that is down, as its client tells it."""

    def __init__(self, token=None):
        pass

    def create_repo(self, *_, **__):
        raise TransportError("[Errno -3] Temporary failure\nin name resolution")

    whoami = create_repo


class TransportError(Exception):
    """Like httpx's: no OSError."""


def test_a_push_that_cannot_be_done_is_one_line_and_no_failure(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(hub, "HfApi", Unreachable)
    assert push(tmp_path, "owner/dog", "hf_token") is None
    (line,) = caplog.messages
    assert "could not be pushed to the hub ([Errno -3] Temporary failure in name" in line and "\n" not in line


def test_the_name_of_a_repository_is_checked_before_training_and_is_that_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Unreachable)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.chdir(tmp_path)
    check_push(TrainConfig(output_dir="."))
    with pytest.raises(UserError, match="--hub_model_id: "):
        check_push(TrainConfig(hub_model_id="no such/name/at all"))


def test_a_token_that_the_hub_does_not_know_is_a_mistake_before_training(monkeypatch):
    def refuse(*_):
        raise LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", refuse)
    with pytest.raises(UserError, match="--push_to_hub: Token is required"):
        check_push(TrainConfig())


def test_the_cards_front_matter_is_yaml_whatever_the_prompt_holds():
    odd = 'a "sks": dog # \u2028 \x1b 🦆 \x85 ---\n---\n'
    front = ModelCard(card(images=(("image_0.png", odd),))).data
    assert front.base_model == "owner/base" and front.instance_prompt == 'a photo of "sks": dog'
    assert front.widget == [{"text": odd, "output": {"url": "image_0.png"}}]


def test_the_pictures_are_known_whoever_wrote_the_yaml():
    text = card(images=(("image_0.png", "a dog"), ("image_1.png", "a cat")))
    reformatted = text.replace("url: image_0.png", "{url: 'image_0.png'}").replace("output:\n    {", "output: {")
    earlier = text.replace("output:\n    url: image_0.png", 'output: {url: "image_0.png"}')
    assert reformatted != text != earlier
    for form in (text, reformatted, earlier):
        assert pictures_named(form) == {"image_0.png", "image_1.png"}


@pytest.mark.parametrize(
    "front", ["a: [", "- a", "widget: 5", "widget: [{output: {url: ../photos/a.png}}]", "widget: [{output: {}}]"]
)
def test_a_card_that_was_changed_by_hand_names_no_other_file(front):
    assert pictures_named(f"---\n{front}\n---\n{SIGNATURE}") == set()


def test_the_card_says_how_exactly_the_files_reload_and_whether_the_run_ended():
    assert "3.0e-07" in card() and "stopped at step" not in card()
    assert "stopped at step 120" in card(step=120)


def test_a_contact_sheet_has_every_row_that_has_pictures(tmp_path):
    tile = Image.new("RGB", (40, 30), (255, 0, 0))
    rows = [Row("photos", [tile] * 8), Row("none", []), Row("end", [tile], ("a very long prompt " * 10,))]
    draw_contact_sheet(rows, tmp_path / "sheet.png", tile_px=64)
    with Image.open(tmp_path / "sheet.png") as sheet:
        reds = np.all(np.array(sheet) == (255, 0, 0), axis=-1).sum()
    assert reds == 9 * 64 * 64


def test_the_running_mean_starts_at_the_first_value_and_keeps_the_length():
    assert running_mean(np.array([4.0, 2.0, 0.0, 2.0]), 2).tolist() == [4, 3, 1, 1]


def test_a_loss_plot_is_drawn_with_and_without_prior(tmp_path):
    steps = [StepDone(n, loss_instance=1 / n) for n in range(1, 30)]
    draw_loss_plot(steps, tmp_path / "loss.png")
    first = (tmp_path / "loss.png").read_bytes()
    draw_loss_plot([replace(step, loss_prior=0.5) for step in steps], tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size[0] > 500 and (tmp_path / "loss.png").read_bytes() != first


@pytest.mark.parametrize("draw", ["sheet", "plot"])
def test_a_picture_that_cannot_be_written_leaves_the_one_before(draw, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"before")
    monkeypatch.setattr("dreambooth_moslora.core.os.fsync", fail_full)
    with pytest.raises(OSError, match="full"):
        if draw == "sheet":
            draw_contact_sheet([Row("photos", [Image.new("RGB", (8, 8))])], path)
        else:
            draw_loss_plot([StepDone(1, loss_instance=1.0)], path)
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def fail_full(_):
    raise OSError(28, "full")
