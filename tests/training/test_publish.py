"""What a run tells, draws and leaves: samples, trackers, card, pictures, and what leaves the
machine."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

from dreambooth_moslora.base import devices
from dreambooth_moslora.disk.events import StepDone, StepEvaluated
from dreambooth_moslora.disk.run_folder import CARD_SIGNATURE, RunDir, list_card_pictures
from dreambooth_moslora.errors import StopRequestedError, UserError
from dreambooth_moslora.generation.sampling import build_stop_callback
from dreambooth_moslora.lora.metadata import AdapterMetadata, format_dora_table
from dreambooth_moslora.lora.verify import FileProof, Proof
from dreambooth_moslora.pictures import SheetRow, draw_contact_sheet
from dreambooth_moslora.plan.validation import check_hub_upload
from dreambooth_moslora.settings.family_facts import FAMILIES
from dreambooth_moslora.settings.parsing import FIELD_TYPES
from dreambooth_moslora.settings.setting_names import SETTINGS
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import hub, publish, reporter
from dreambooth_moslora.training.hub import list_public_files, push_to_hub
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.model_card import CardFacts, render_model_card
from dreambooth_moslora.training.run_plots import compute_running_mean, plot_losses
from tests.helpers.tiny_training import logged, paint_photos, tiny_config

pytestmark = pytest.mark.usefixtures("few_steps")
DOCS = Path(__file__).parents[2] / "docs"
DRAWN = {"num_validation_images": 3, "validation_steps": 2}


def card(use_dora: bool = False, **changes) -> str:
    config = TrainConfig(
        instance_prompt='a photo of "sks": dog', learning_rate=1e-4, use_dora=use_dora
    )
    proof = Proof("fp32", 1e-5, 560, (FileProof("a.safetensors", 3e-7, "unet.x", "diffusers"),))
    facts = AdapterMetadata(rank=4, alpha=4.0, base_id="owner/base", trigger_words=("sks dog",))
    values = {"name": "dog", "step": 500, "max_train_steps": 500, "adapter": facts, "proof": proof}
    return render_model_card(
        config, CardFacts(**{**values, "images": (("image_0.png", 'a "sks": dog'),), **changes})
    )


def test_the_card_says_which_photos_a_model_made():
    sentence = "2 of 3 photos were made by owner/editor, licence Apache-2.0"
    assert (
        f"\n\n{sentence}.\n\n## Proof" in card(synthetic_lines=(sentence,))
        and "made by" not in card()
    )


def test_card_tells_proof_programs_and_end_of_run():
    """0.29 and 0.33 of diffusers ignore `dtype=` and load fp32."""
    assert "from_pretrained('owner/base', torch_dtype=torch.float16)" in card()
    assert "is the same adapter for ComfyUI" in card() and "DoRA" not in card()
    assert "the same adapter for" not in card(use_dora=True) and format_dora_table() in card(
        use_dora=True
    )
    assert (
        "3.0e-07" in card()
        and "stopped at step" not in card()
        and "stopped at step 120" in card(step=120)
    )
    assert "sks\": dog').images[0]\n```" in card() and "Licence" not in card()
    assert "# dog: an SDXL adapter for “a photo" in card()
    toy = AdapterMetadata(rank=4, alpha=4.0, base_id="toy")
    assert "# dog: a practice adapter of the embedded base `toy` for “a" in card(adapter=toy)


def test_card_and_guide_name_equal_programs():
    """It named Fooocus, which nobody has tried, and not Forge."""
    guide = (DOCS / "comfyui.md").read_text(encoding="utf-8")
    readers = set(re.findall(r"^\| ([^|]+) \| yes", guide, re.MULTILINE))
    libraries = {"diffusers", "kohya's sd-scripts", "OneTrainer"}
    programs = re.search("is the same adapter for (.+) and (.+)\\.", card())
    assert {*programs[1].split(", "), programs[2]} == readers - libraries != set()


def test_transformer_card_tells_licence_and_text_options():
    structures = {"transformer": {"class": "FluxTransformer2DModel", "config": {}}}
    facts = AdapterMetadata(rank=4, alpha=4.0, base_id="owner/base", structures=structures)
    sentence = (
        "| Base | owner/base |\n| Licence of FLUX.1 | FLUX.1 dev Non-Commercial |\n| Adapter |"
    )
    assert sentence in card(adapter=facts) and "ComfyUI reads the same file." in card(adapter=facts)
    assert "reads the same" not in card(True, adapter=facts) and "drops DoRA's" in card(
        True, adapter=facts
    )
    facts = AdapterMetadata(rank=4, alpha=4.0, recipe={"text_encoder_out_layers": ["9", "18"]})
    assert "text_encoder_out_layers=(9, 18)).images[0]\n```" in card(adapter=facts)


@pytest.mark.parametrize(
    "family",
    [facts for facts in FAMILIES if facts.denoiser == "transformer"],
    ids=lambda family: family.name,
)
def test_the_card_says_whether_comfyui_reads_the_familys_file(family):
    structures = {"transformer": {"class": family.model, "config": {}}}
    facts = AdapterMetadata(rank=4, alpha=4.0, structures=structures)
    reads, sentence = not family.not_in_comfyui, "ComfyUI reads the same file."
    if not reads:
        sentence = f"ComfyUI does not read this file: {family.not_in_comfyui}."
    assert sentence in card(adapter=facts)
    assert ("drops DoRA's magnitudes" in card(use_dora=True, adapter=facts)) == reads
    assert (sentence in card(use_dora=True, adapter=facts)) != reads


def test_front_matter_is_yaml_and_names_only_images():
    odd = 'a "sks": dog # \u2028 \x1b 🦆 \x85 ---\n---\n'
    front = ModelCard(card(images=(("image_0.png", odd),))).data
    assert front.base_model == "owner/base" and front.instance_prompt == 'a photo of "sks": dog'
    assert front.widget == [{"text": odd, "output": {"url": "image_0.png"}}]
    assert list_card_pictures(
        card(images=(("image_0.png", "a dog"), ("image_1.png", "a cat")))
    ) == {
        "image_0.png",
        "image_1.png",
    }
    assert (
        list_card_pictures(
            f"---\nwidget: [{{output: {{url: ../photos/a.png}}}}]\n---\n{CARD_SIGNATURE}"
        )
        == set()
    )


@pytest.mark.parametrize(
    "name", ["dog", "dog[1]", "dog]", "a*b?", "[!d]og", "dog [of mine", "{dog}"]
)
def test_only_public_files_are_pushed_whatever_their_names(name, tmp_path, monkeypatch):
    patterns = []

    class Hub:
        def __init__(self, token):
            self.create_repo = lambda *_, **__: SimpleNamespace(repo_id="owner/dog")
            self.upload_folder = lambda allow_patterns, **_: patterns.extend(allow_patterns)

    monkeypatch.setattr(hub, "HfApi", Hub)
    public = [
        "README.md",
        f"{name}.kohya.safetensors",
        "image_0.png",
        "pytorch_lora_weights.safetensors",
    ]
    private = [
        "contact_sheet.png",
        "train_config.json",
        "metrics.jsonl",
        "train.log",
        "samples/step_000000_0.png",
    ]
    private += ["class_images/class_1_00000.png", "checkpoint-5/moslora_weights.safetensors"]
    private += ["earlier_run_1/dog.kohya.safetensors", "best/pytorch_lora_weights.safetensors"]
    for name in [*public, *private]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_public_files(tmp_path) == sorted(public)
    push_to_hub(tmp_path, "owner/dog", None)
    other_names = ["dog1.kohya.safetensors", "axxbx.kohya.safetensors", "log.kohya.safetensors"]
    assert (
        list(filter_repo_objects([*public, *private, *other_names], allow_patterns=patterns))
        == public
    )


class Unreachable(HfApi):
    """A hub behind a network that is down, as its client tells it: its error is no OSError."""

    def create_repo(self, *_, **__):
        raise LookupError("[Errno -3] Temporary failure\nin name resolution")

    whoami = create_repo


def test_failed_push_is_one_line_and_token_is_checked_first(tmp_path, monkeypatch, caplog):
    """The name is that of the run."""

    def refuse(*_):
        raise LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(hub, "HfApi", Unreachable)
    push_to_hub(tmp_path, "owner/dog", "hf_token")
    (line,) = caplog.messages
    assert (
        "could not be pushed to the hub ([Errno -3] Temporary failure in name" in line
        and "\n" not in line
    )
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as down:
        down.setattr("huggingface_hub.HfApi", Unreachable)
        check_hub_upload(TrainConfig(output_dir="."))
        with pytest.raises(UserError, match="--hub_model_id: "):
            check_hub_upload(TrainConfig(hub_model_id="no such/name/at all"))
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", refuse)
    with pytest.raises(UserError, match="--push_to_hub: Token is required"):
        check_hub_upload(TrainConfig())


def test_contact_sheet_rows_and_loss_plots(tmp_path):
    """A row of no picture is none. Pictures are whole: a portrait was cut to a square, without its
    head."""
    tile = Image.new("RGB", (40, 30), (255, 0, 0))
    rows = [
        SheetRow("photos", [tile] * 8),
        SheetRow("none", []),
        SheetRow("end", [tile], ("a very long prompt " * 10,)),
    ]
    steps = [StepDone(n, loss_instance=1 / n) for n in range(1, 30)]
    draw_contact_sheet(rows, tmp_path / "sheet.png", tile_px=64)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert np.all(np.array(sheet) == (255, 0, 0), axis=-1).sum() == 9 * 64 * 48
    assert compute_running_mean(np.array([4.0, 2.0, 0.0, 2.0]), 2).tolist() == [4, 3, 1, 1]
    plot_losses(steps, tmp_path / "loss.png")
    first = (tmp_path / "loss.png").read_bytes()
    plot_losses([replace(step, loss_prior=0.5) for step in steps], tmp_path / "loss.png")
    assert (
        Image.open(tmp_path / "loss.png").size[0] > 500
        and (tmp_path / "loss.png").read_bytes() != first
    )


@pytest.fixture
def config(tiny_base, tmp_path):
    """Three steps without pictures."""
    photos = paint_photos(tmp_path / "photos")
    return lambda **changes: tiny_config(
        tiny_base, photos, tmp_path / "run", **{"max_train_steps": 3, **changes}
    )


def test_failed_push_still_draws_plot_and_sheet(config, tmp_path, monkeypatch):
    pushed_names = []

    def push(folder, *_):
        pushed_names.extend(path.name for path in folder.iterdir())
        raise UserError("no hub")

    monkeypatch.setattr(publish, "push_to_hub", push)
    with pytest.raises(UserError, match="no hub"):
        train(config(max_train_steps=1, push_to_hub=True))
    assert {"README.md", "pytorch_lora_weights.safetensors"} <= set(
        pushed_names
    ) and "loss.png" not in pushed_names
    assert (tmp_path / "run" / "loss.png").is_file()


def test_stop_while_sampling_ends_within_one_image(config, tmp_path):
    tensors = {"latents": 1}
    assert build_stop_callback(lambda: False)(None, 0, None, tensors) is tensors
    with pytest.raises(StopRequestedError):
        build_stop_callback(lambda: True)(None, 0, None, tensors)
    samples = tmp_path / "run" / "samples"
    result = train(config(**DRAWN), should_stop=(samples / "step_000000_0.png").exists)
    assert result.interrupted and result.step == 0
    assert [path.name for path in samples.iterdir()] == ["step_000000_0.png"]
    assert not RunDir(tmp_path / "run").list_checkpoints()


def test_unused_gpu_memory_is_freed_between_stages(config, monkeypatch):
    """After photos, after prompts, and after pictures and scores: the next stage has it."""
    stages = []
    monkeypatch.setattr(devices, "free_unused_memory", lambda device: stages.append("free"))

    def note(event):
        name = getattr(event, "phase", event.kind)
        if stages[-1:] != [name]:
            stages.append(name)

    def evaluator(sampler, step):
        return {"score": 1}

    evaluator.prompts = ()
    sample_settings = {"num_validation_images": 1, "validation_steps": 2}
    train(config(max_train_steps=2, evaluate_steps=2, **sample_settings), note, evaluator=evaluator)
    prepared = "start loading caching free free"
    first, last = "sampling sample free step", "evaluating free evaluation sampling sample free"
    assert " ".join(stages).startswith(f"{prepared} {first} {last} ")


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_unused_memory_goes_back_to_the_driver_of_each_gpu(kind, monkeypatch):
    emptied = []
    monkeypatch.setattr(getattr(torch, kind), "empty_cache", lambda: emptied.append(kind))
    for device in (kind, "cpu"):
        devices.free_unused_memory(torch.device(device))
    assert emptied == [kind]


@pytest.mark.parametrize("is_typed", [False, True])
def test_custom_evaluator_scores_and_best_step_is_kept(is_typed, config, tmp_path):
    """Whole numbers were left out of `metrics.jsonl`, and scores without `best` ended the run."""
    scores = {1: {"score": 0.25, "count": 3}, 2: {"score": 1, "count": 4}, 3: {"likeness": 2}}

    def evaluator(sampler, step):
        return StepEvaluated(step, scores[step]) if is_typed else scores[step]

    evaluator.prompts = ()
    train(config(evaluate_steps=1), evaluator=evaluator)
    evaluations = logged(tmp_path / "run", "evaluation")
    assert [event.get("score") for event in evaluations] == [0.25, 1, None]
    assert [event.get("count") for event in evaluations] == [3, 4, None] and evaluations[2][
        "likeness"
    ] == 2
    assert [event["best"] for event in evaluations[1:]] == [{"step": 2, "score": 1, "since": 0}] * 2
    assert RunDir(tmp_path / "run").best_dir.is_dir()


def test_run_without_scores_has_no_best_step(config, tmp_path):
    def evaluator(sampler, step):
        return {"likeness": 0.5}

    evaluator.prompts = ()
    train(config(evaluate_steps=1), evaluator=evaluator)
    run = RunDir(tmp_path / "run")
    assert [event["best"] for event in logged(run.path, "evaluation")] == [None] * 3
    assert run.adapter_path.is_file() and not run.best_dir.exists()
    assert "Best step" not in run.card_path.read_text()


@pytest.mark.slow
def test_stop_while_scoring_saves_and_resume_catches_up(config, tmp_path):
    run, steps_asked, settings = RunDir(tmp_path / "run"), [], DRAWN | {"evaluate_steps": 2}

    def evaluator(sampler, step):
        """It is interrupted the first time."""
        steps_asked.append(step)
        if len(steps_asked) == 1:
            raise StopRequestedError
        return {"score": 1.0, "best": {"step": step, "score": 1.0, "since": 0}}

    evaluator.prompts = ()
    result = train(config(**settings), evaluator=evaluator, should_stop=lambda: bool(steps_asked))
    assert result.interrupted and result.step == 2 and run.adapter_path.is_file()
    assert not (run.samples_dir / "step_000002_1.png").exists()
    assert train(config(resume_from_checkpoint="latest", **settings), evaluator=evaluator).step == 3
    assert steps_asked == [2, 2] and [
        event["step"] for event in logged(run.path, "evaluation")
    ] == [2]
    assert [event["step"] for event in logged(run.path, "sample")] == [0, 2, 3]


def test_trackers_get_settings_without_user_text():
    def start_and_get_config(**settings) -> dict:
        got = {}
        accelerator = SimpleNamespace(init_trackers=lambda _, config: got.update(config))
        reporter.Reporter(RunDir("run"), accelerator, None).start_trackers(TrainConfig(**settings))
        return got

    tracked = start_and_get_config(optimizer="Prodigy", learning_rate=1.0, random_flip=True)
    assert (tracked["optimizer"], tracked["learning_rate"], tracked["random_flip"]) == (
        "Prodigy",
        1.0,
        True,
    )
    for name in [name for name, (kind, _) in FIELD_TYPES.items() if kind is str]:
        if not SETTINGS[name].metadata["choices"]:
            assert "alice" not in start_and_get_config(**{name: "alice"}).values(), name


def test_failing_tracker_warns_once_or_refuses_to_start(config, tmp_path, monkeypatch, caplog):
    """That ends the run before anything is loaded."""
    (tmp_path / "run" / "logs").mkdir(parents=True)
    file, steps_asked, log, events = (
        tmp_path / "run" / "logs" / "dreambooth_moslora",
        [],
        TensorBoardTracker.log,
        [],
    )
    file.write_text("no folder")
    with pytest.raises(
        UserError, match=r"report_to=.tensorboard. cannot start: FileExistsError .*; none trains"
    ):
        train(config(report_to="tensorboard"), events.append)
    assert [event.kind for event in events] == ["start", "end"] and not caplog.text
    file.unlink()

    def fail_later(self, values, step, **options):
        steps_asked.append(step)
        if step > 1:
            raise ConnectionError("no\nnetwork")
        log(self, values, step, **options)

    monkeypatch.setattr(TensorBoardTracker, "log", fail_later)
    assert train(config(report_to="tensorboard")).proof is not None
    assert steps_asked == [1, 2]
    assert (
        caplog.text.count(
            "tensorboard failed and is not used again in this run: ConnectionError no network"
        )
        == 1
    )
