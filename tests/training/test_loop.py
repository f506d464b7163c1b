"""Whole small trainings on the tiny base: what they leave and learn, that every option acts, how they end."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, EDMEulerScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from dreambooth_moslora.adapters.moslora import disabled
from dreambooth_moslora.adapters.raw_file import read_raw
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.events import StepDone, events_of, record_of
from dreambooth_moslora.disk.queue import LOCK_NAME, locked
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.training import objective
from dreambooth_moslora.training import step as train_step_module
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.step import StepLosses, TrainStep, prior_prompts
from tests.helpers.tiny import save_tiny_sdxl
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config


@pytest.fixture
def run(tiny_base, photos, tmp_path):
    """Train with changes; returns the events and the adapter's hash."""

    def go(name="run", **changes):
        events = []
        train(tiny_config(tiny_base, photos, tmp_path / name, **changes), events.append)
        return events, adapter_sha256(tmp_path / name)

    return go


def steps(events):
    return [event for event in events if isinstance(event, StepDone)]


@pytest.fixture(scope="module")
def shown_run(tiny_base, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dog"
    events = []
    config = tiny_config(
        tiny_base,
        photos,
        folder,
        num_validation_images=2,
        validation_steps=2,
        checkpointing_steps=2,
        checkpoints_total_limit=2,
        learning_rate=0.3,  # so that a sample shows it
        report_to="tensorboard",
        hub_token="hf_secret",
    )
    return folder, events, train(config, events.append)


def test_the_run_folder_is_what_the_design_says(shown_run):
    folder, _, result = shown_run
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "pytorch_lora_weights.safetensors",
        "dog.kohya.safetensors",
        "README.md",
        *(f"image_{n}.png" for n in range(6)),
        "train_config.json",
        "metrics.jsonl",
        "samples",
        "checkpoint-2",
        "checkpoint-4",
        "last",
        "contact_sheet.png",
        "loss.png",
        "logs",
    }
    drawn = sorted(path.name for path in (folder / "samples").iterdir())
    assert drawn == [f"step_{step:06d}_{n}.png" for step in (0, 2, 4, 5) for n in (0, 1)]
    assert result.proof.max_relative_difference < 1e-5


def test_the_events_tell_the_run_from_its_first_step(shown_run):
    folder, events, _ = shown_run
    assert json.loads(json.dumps([record_of(event) for event in events])) == RunDir(folder).read_metrics()
    assert events[0].kind == "start" and events[0].max_train_steps == 5
    assert [event.step for event in steps(events)] == [1, 2, 3, 4, 5]
    keys = {"loss", "loss_instance", "loss_prior", "lr", "step_sec", "eta_sec", "memory_gib", "grad_norm"}
    assert keys <= set(record_of(steps(events)[0]))
    samples = [event for event in events if event.kind == "sample"]
    assert [event.step for event in samples] == [0, 2, 4, 5]
    assert len({tuple(event.seeds) for event in samples}) == 1
    assert events[-1].kind == "end" and events[-1].state == "done"


@pytest.mark.parametrize(("step", "with_adapter"), [(0, False), (5, True)])
def test_samples_differ_between_steps_only_by_the_adapter(step, with_adapter, shown_run, tiny_base):
    """An untouched pipeline draws the first ones as it is, and the last ones once it has loaded the folder."""
    folder, events, _ = shown_run
    sample = next(event for event in events if event.kind == "sample" and event.step == step)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_base)
    pipeline.set_progress_bar_config(disable=True)
    if with_adapter:
        pipeline.load_lora_weights(str(folder))
    options = {"num_inference_steps": 25, "guidance_scale": 5.0, "height": 64, "width": 64}
    generator = torch.Generator().manual_seed(sample.seeds[0])
    drawn = pipeline(sample.prompts[0], generator=generator, **options).images[0]
    assert difference(Image.open(folder / sample.files[0]), drawn) <= 2
    other = Image.open(folder / "samples" / f"step_{5 - step:06d}_0.png")
    assert difference(other, drawn) > 2


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest, in levels of 256."""
    ours, theirs = (torch.tensor(list(image.convert("RGB").tobytes())).int() for image in (one, other))
    return int((ours - theirs).abs().max())


def test_nothing_private_is_in_what_is_shared(shown_run, photos):
    folder, _, _ = shown_run
    shared = [folder / "README.md", *folder.glob("*.safetensors")]
    for path in shared:
        content = path.read_bytes()
        assert str(photos).encode() not in content and str(folder.parent).encode() not in content
    for path in (folder / "train_config.json", folder / "metrics.jsonl"):
        assert "hf_secret" not in path.read_text()


def test_the_config_that_was_written_trains_the_same(shown_run, tmp_path):
    from dreambooth_moslora.settings.table import TrainConfig

    folder, _, _ = shown_run
    written = json.loads((folder / "train_config.json").read_text())
    quiet = {"output_dir": str(tmp_path), "num_validation_images": 0, "report_to": "none"}
    train(TrainConfig.from_dict({**written, **quiet}))
    assert adapter_sha256(tmp_path) == adapter_sha256(folder)


@pytest.fixture
def train_steps(monkeypatch):
    """The TrainStep of each training, as it was left."""
    found, original = [], train_step_module.TrainStep.__init__

    def note(self, *arguments):
        original(self, *arguments)
        found.append(self)

    monkeypatch.setattr(train_step_module.TrainStep, "__init__", note)
    return found


def test_the_adapter_lowers_the_loss_on_equal_noise(tiny_base, tmp_path, train_steps):
    photos = paint_photos(tmp_path / "photos", count=1)
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    size = {"rank": 16, "train_batch_size": 4, "max_train_steps": 40, "target_modules": attention}
    train(tiny_config(tiny_base, photos, tmp_path / "run", **size))
    train_step = train_steps[0]
    with torch.no_grad():
        trained = sum(float(train_step.micro_batch_loss(n).total) for n in range(1000, 1008))
        with disabled(train_step.components["unet"]):
            untrained = sum(float(train_step.micro_batch_loss(n).total) for n in range(1000, 1008))
    assert trained < 0.95 * untrained  # 0.89 was seen


def test_readers_ahead_change_nothing(run):
    options = {"caching": "off", "random_flip": True, "max_train_steps": 3}
    assert run("a", **options)[1] == run("b", dataloader_num_workers=2, **options)[1]


SAME = {
    "gradient checkpointing": {"gradient_checkpointing": True},
    "disk cache": {"caching": "disk"},
    "two runs": {},
}


@pytest.mark.parametrize("name", SAME)
def test_what_only_costs_otherwise_changes_nothing(name, run, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run("a", max_train_steps=2)[1] == run("b", max_train_steps=2, **SAME[name])[1]


def test_two_runs_leave_the_same_bytes_in_every_adapter_file(run, tmp_path):
    for name in ("a", "b"):
        run(f"{name}/dog", max_train_steps=2)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.safetensors"))
    assert len(files) == 3
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


class Left:
    """What a run of two steps left: its steps, the raw adapter's tensors by their last name, the optimizer's states."""

    def __init__(self, folder):
        run_dir = RunDir(folder)
        self.steps = events_of(StepDone, run_dir.read_metrics())
        self.loss = self.steps[0].loss
        checkpoint = run_dir.latest_checkpoint()
        tensors = load_file(checkpoint / "moslora_weights.safetensors")
        self.modules = {name.split(".")[0] for name in tensors if "." in name}
        self.kinds = {name.rpartition(".")[2] for name in tensors}
        self.tensors = {
            kind: torch.cat([t.flatten() for name, t in tensors.items() if name.endswith(f".{kind}")])
            for kind in self.kinds
            if any(name.endswith(f".{kind}") for name in tensors)
        }
        self.facts = read_raw(checkpoint / "moslora_weights.safetensors")[1]
        self.states = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        self.is_orthogonal = all(
            torch.allclose(t @ t.T, torch.eye(len(t)), atol=1e-5) for n, t in tensors.items() if n.endswith(".mixer")
        )

    def size(self, kind):
        return float(self.tensors[kind].norm())


def is_rounded(left, plain):
    return left.loss != plain.loss and left.loss == pytest.approx(plain.loss, rel=0.05)


OPTIONS = {
    "seed": ({"seed": 4}, lambda left, plain: left.loss != plain.loss),
    "rank": ({"rank": 2}, lambda left, plain: 2 * len(left.tensors["lora_A"]) == len(plain.tensors["lora_A"])),
    "mixer": ({"mixer": "identity"}, lambda left, plain: left.facts.mixer == "identity"),
    "frozen mixer": ({"train_mixer": False}, lambda left, plain: left.is_orthogonal and not plain.is_orthogonal),
    "mixer_lr_scale": (
        {"mixer_lr_scale": 10.0},
        lambda left, plain: not torch.allclose(left.tensors["mixer"], plain.tensors["mixer"], atol=0.02),
    ),
    "alpha": ({"lora_alpha": 8}, lambda left, plain: left.facts.alpha == 8 and left.loss == plain.loss),
    "rslora": ({"use_rslora": True}, lambda left, plain: left.facts.use_rslora and left.loss == plain.loss),
    "dora": ({"use_dora": True}, lambda left, plain: left.kinds > plain.kinds),
    "dropout": (
        {"lora_dropout": 0.5},  # nothing to drop while B is zero
        lambda left, plain: left.loss == plain.loss and left.steps[1].loss != plain.steps[1].loss,
    ),
    "snr_gamma": ({"snr_gamma": 1e-3}, lambda left, plain: left.loss < plain.loss),
    "timestep bias": (
        {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 1e3},
        lambda left, plain: left.loss != plain.loss,
    ),
    "edm": ({"do_edm_style_training": True}, lambda left, plain: left.loss != plain.loss),
    "bf16": ({"mixed_precision": "bf16"}, is_rounded),
    "nf4": ({"base_quantization": "nf4"}, is_rounded),
    "adapter_off": (
        {"with_prior_preservation": True, "prior": "adapter_off"},
        lambda left, plain: left.steps[1].loss_prior > 0 and plain.steps[1].loss_prior is None,
    ),
    "text encoder": (
        {"train_text_encoder": True},
        lambda left, plain: left.modules - plain.modules == {"text_encoder", "text_encoder_2"},
    ),
    "8-bit": (
        {"use_8bit_adam": True, "rank": 128},
        lambda left, plain: any("__bnb_optimizer_quant_state__" in s for s in left.states["state"].values()),
    ),
    "prodigy": (
        {"optimizer": "prodigy", "learning_rate": 1.0},
        lambda left, plain: left.states["param_groups"][0]["d"] > 0 and "d" not in plain.states["param_groups"][0],
    ),
    "cosine": (
        {"lr_scheduler": "cosine", "lr_warmup_steps": 1},
        lambda left, plain: left.steps[1].lr < left.steps[0].lr == plain.steps[0].lr,
    ),
    "clipping": (
        {"max_grad_norm": 1e-6, "adam_epsilon": 1e-4},
        lambda left, plain: (
            left.size("lora_B") < plain.size("lora_B") / 10 and left.steps[0].grad_norm == plain.steps[0].grad_norm
        ),
    ),
    "weight decay": ({"adam_weight_decay": 5.0}, lambda left, plain: left.size("lora_A") < 0.97 * plain.size("lora_A")),
    "scale_lr": (
        {"scale_lr": True, "train_batch_size": 2},
        lambda left, plain: left.steps[0].lr == 2 * plain.steps[0].lr,
    ),
    "center_crop": ({"center_crop": True}, lambda left, plain: left.loss != plain.loss),
    "interpolation": (
        {"image_interpolation_mode": "nearest"},  # the first photo has the size already
        lambda left, plain: left.steps[1].loss != plain.steps[1].loss,
    ),
}

"""Changes, and what they must show beside the run without them."""


@pytest.fixture(scope="module")
def plain_run(tiny_base, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    train(tiny_config(tiny_base, photos, folder, max_train_steps=2))
    return Left(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_acts_as_its_name_says_and_stays_finite(name, run, plain_run, tmp_path):
    changes, acts = OPTIONS[name]
    run(max_train_steps=2, **changes)
    left = Left(tmp_path / "run")
    assert all(math.isfinite(step.loss) for step in left.steps)
    assert acts(left, plain_run)


def test_unmasked_weight_goes_from_the_subject_alone_to_no_mask_at_all(run, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "masked")
    for photo in sorted(folder.glob("*.png")):
        with Image.open(photo) as image:
            mask = Image.new("L", image.size, 0)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        mask.save(photo.with_suffix(".mask.png"))
    plain, *masked = (
        steps(run(name, max_train_steps=2, **settings)[0])
        for name, settings in (
            ("plain", {}),
            *((f"w{w}", {"instance_data_dir": str(folder), "unmasked_weight": w}) for w in (1.0, 0.2, 0.0)),
        )
    )
    everywhere, some, none = ([event.loss for event in events] for events in masked)
    assert everywhere == pytest.approx([event.loss for event in plain], rel=1e-5)
    assert len({losses[0] for losses in (everywhere, some, none)}) == 3


def test_a_v_prediction_base_is_trained_on_velocity(tmp_path, photos, monkeypatch):
    base, noised, targets = save_tiny_sdxl(tmp_path / "base", prediction_type="v_prediction"), [], []
    add_noise, loss = train_step_module.objective.add_noise, train_step_module.objective.loss
    monkeypatch.setattr(
        train_step_module.objective, "add_noise", lambda *given: noised.append(given) or add_noise(*given)
    )
    monkeypatch.setattr(objective, "loss", lambda *given: targets.append(given[1]) or loss(*given))
    train(tiny_config(base, photos, tmp_path / "run", max_train_steps=2))
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    for (_, latents, noise, index), target in zip(noised, targets, strict=True):
        torch.testing.assert_close(target, scheduler.get_velocity(latents, noise, index), atol=1e-5, rtol=1e-4)


def test_min_snr_weighs_the_instance_loss_and_leaves_the_prior_alone(run):
    prior = {"with_prior_preservation": True, "max_train_steps": 1, "train_batch_size": 2}
    plain, weighted = (steps(run(name, snr_gamma=gamma, **prior)[0])[0] for name, gamma in (("a", None), ("b", 1e-3)))
    assert weighted.loss_prior == plain.loss_prior
    assert weighted.loss_instance < 0.9 * plain.loss_instance


def test_min_snr_on_an_edm_base_is_refused(tmp_path, photos):
    base = tmp_path / "base"
    save_tiny_sdxl(base)
    EDMEulerScheduler().save_pretrained(base / "model" / "scheduler")
    index = base / "model" / "model_index.json"
    index.write_text(index.read_text().replace("EulerDiscreteScheduler", "EDMEulerScheduler"))
    with pytest.raises(UserError, match="EDM style"):
        train(tiny_config(base / "model", photos, tmp_path / "run", snr_gamma=5.0))


def test_prior_losses_are_logged_apart_and_class_images_have_a_manifest(run, tmp_path):
    events, _ = run(with_prior_preservation=True, prior_loss_weight=0.5, max_train_steps=2)
    for event in steps(events):
        assert event.loss == pytest.approx(event.loss_instance + 0.5 * event.loss_prior, rel=1e-5)
    folder = tmp_path / "run" / "class_images"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest) == sorted(path.name for path in folder.glob("*.png")) and len(manifest) == 3
    assert {facts["prompt"] for facts in manifest.values()} == {"a photo of a dog"}


def test_the_base_is_its_own_prior_so_the_first_prior_loss_is_zero(run):
    events, _ = run(with_prior_preservation=True, prior="adapter_off", max_train_steps=3)
    losses = [event.loss_prior for event in steps(events)]
    assert losses[0] < 1e-9 < losses[2]


def test_other_prior_prompts_are_preserved_beside_the_class_and_each_by_its_own_answer(run):
    others = {"prior_prompts": ("a red car in the snow", "a cup"), "train_batch_size": 4, "max_train_steps": 3}
    events, digest = run("others", with_prior_preservation=True, prior="adapter_off", **others)
    losses = [event.loss_prior for event in steps(events)]
    assert losses[0] < 1e-9 < losses[2]
    _, plain = run("plain", with_prior_preservation=True, prior="adapter_off", **{**others, "prior_prompts": ()})
    assert digest != plain


def test_every_second_prior_prompt_is_the_class_prompt(tiny_base, photos, tmp_path):
    config = tiny_config(tiny_base, photos, tmp_path, prior_prompts=("a car", "a cup"))
    classes = [config.class_prompt] * 50
    drawn = Counter(prompt for turn in (0, 1) for prompt in prior_prompts(config, classes, turn))
    assert 35 < drawn["a photo of a dog"] < 65 and min(drawn["a car"], drawn["a cup"]) > 10 and len(drawn) == 3


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(run, monkeypatch, tmp_path):
    step = train_step_module.TrainStep.accumulate_gradients
    bad = StepLosses(float("nan"), float("nan"), None)
    monkeypatch.setattr(
        train_step_module.TrainStep, "accumulate_gradients", lambda self: step(self) if self.step < 2 else bad
    )
    with pytest.raises(UserError, match="at step 3: lower --learning_rate"):
        run(checkpointing_steps=2)
    events = RunDir(tmp_path / "run").read_metrics()
    assert events[-1]["state"] == "failed" and events[-1]["step"] == 2
    assert RunDir(tmp_path / "run").latest_checkpoint().name == "checkpoint-2"


def test_stopping_before_the_first_step_leaves_no_adapter(tiny_base, photos, tmp_path):
    result = train(tiny_config(tiny_base, photos, tmp_path), should_stop=lambda: True)
    assert result.interrupted and result.step == 0 and result.proof is None
    assert not RunDir(tmp_path).adapter_path.exists() and RunDir(tmp_path).checkpoints() == []


def test_stopping_while_the_first_samples_are_drawn_leaves_no_adapter(tiny_base, photos, tmp_path):
    events = []
    config = tiny_config(tiny_base, photos, tmp_path, num_validation_images=1)
    result = train(config, events.append, lambda: any(event.kind == "sample" for event in events))
    assert result.interrupted and result.step == 0 and RunDir(tmp_path).checkpoints() == []
    assert events[-1].state == "interrupted"


def test_epochs_are_counted_as_in_diffusers_script(run):
    assert len(steps(run(max_train_steps=None, num_train_epochs=2)[0])) == 6
    assert len(steps(run(max_train_steps=None, train_batch_size=2, gradient_accumulation_steps=2)[0])) == 1


def test_memory_holds_no_text_encoder_and_the_adapter_is_fp32(tiny_base, photos, tmp_path, train_steps):
    train(tiny_config(tiny_base, photos, tmp_path, mixed_precision="bf16", caching="off", max_train_steps=1))
    pipeline = train_steps[0].inputs.pipeline
    assert pipeline.text_encoder is None and pipeline.text_encoder_2 is None
    assert pipeline.unet.dtype == torch.bfloat16 and pipeline.vae.dtype == torch.float32
    assert {p.dtype for p in train_steps[0].parameters} == {torch.float32}


def test_sizes_reach_a_bf16_base_unrounded(tiny_base, tmp_path, monkeypatch):
    """bf16 has eight bits: a photo of 1365 px would be one of 1368."""
    photos, seen, forward = tmp_path / "photos", [], UNet2DConditionModel.forward
    photos.mkdir()
    Image.new("RGB", (1365, 683)).save(photos / "wide.png")

    def look(self, *arguments, added_cond_kwargs, **options):
        seen.append(added_cond_kwargs["time_ids"])
        return forward(self, *arguments, added_cond_kwargs=added_cond_kwargs, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", look)
    train(tiny_config(tiny_base, photos, tmp_path / "run", mixed_precision="bf16", max_train_steps=1))
    assert seen[0][0, :2].tolist() == [683, 1365]


@pytest.fixture
def config(tiny_base, tmp_path):
    return tiny_config(tiny_base, paint_photos(tmp_path / "photos"), tmp_path / "run", max_train_steps=1)


@pytest.fixture
def lost_tracker(monkeypatch):
    def fail(_):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(Accelerator, "end_training", fail)


def lose(*_):
    raise UserError("the loss is nan")


def test_a_tracker_that_fails_at_the_end_loses_no_finished_run(config, lost_tracker, caplog):
    assert train(config).proof is not None
    assert "--report_to: ending it failed: ConnectionError no network" in caplog.text


@pytest.mark.parametrize(
    ("weight_decay", "says", "kept"),
    [(1e38, "the adapter is not finite after step 1", []), (1e30, "the gradient is nan at step 2", ["checkpoint-1"])],
)
def test_an_adapter_that_is_not_finite_becomes_no_checkpoint(weight_decay, says, kept, config):
    """The loss before a step knows nothing of what that step does: here it overflows."""
    sizes = {"adam_weight_decay": weight_decay, "learning_rate": 1e2}
    config = replace(config, max_train_steps=2, checkpointing_steps=1, **sizes)
    with pytest.raises(UserError, match=f"{says}: lower --learning_rate"):
        train(config)
    assert [path.name for path in RunDir(config.output_dir).checkpoints()] == kept


def test_a_tracker_that_fails_at_the_end_hides_no_error(config, lost_tracker, monkeypatch, caplog):
    monkeypatch.setattr(TrainStep, "accumulate_gradients", lose)
    with pytest.raises(UserError, match="the loss is nan"):
        train(config)
    assert "ConnectionError" in caplog.text


def test_an_end_that_cannot_be_written_hides_no_error(config, monkeypatch):
    def full(self, event):
        if event["type"] == "end":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(TrainStep, "accumulate_gradients", lose)
    monkeypatch.setattr(RunDir, "append_metrics", full)
    with pytest.raises(UserError, match="the loss is nan"):
        train(config)


HOLD = """
import sys
from pathlib import Path
from dreambooth_moslora.disk.queue import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    pytest.importorskip("fcntl")
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_in_a_folder_is_refused_and_touches_nothing(holder, tiny_base, tmp_path, tmp_path_factory):
    photos = paint_photos(tmp_path_factory.mktemp("photos"))
    config = tiny_config(tiny_base, photos, tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=f"process {holder.pid} on {socket.gethostname()} is training there"):
        train(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_lock_of_a_killed_process_holds_nobody_up(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert str(holder.pid) in (tmp_path / LOCK_NAME).read_text()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK_NAME).read_text()
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_folder_is_free_again_after_its_run(tmp_path):
    for _ in range(2):
        with locked(tmp_path), pytest.raises(UserError, match="is training there"), locked(tmp_path):
            pass
