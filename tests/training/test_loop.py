"""Whole small trainings on the tiny base: what they leave and learn, that every option acts, how
they end."""

import json
import math
import os
import subprocess
import sys
from collections import Counter, defaultdict, deque
from dataclasses import replace
from itertools import count, islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    DDPMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from dreambooth_moslora.disk.events import StepDone, build_record, filter_events
from dreambooth_moslora.disk.queue import LOCK_NAME, lock_folder
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import raw_file
from dreambooth_moslora.method import moslora
from dreambooth_moslora.seeds import seed_generator
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import loop
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.step import TrainStep, sample_prior_prompts
from tests.generation.test_pipeline import has_difference
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
def shown_run(tiny_base, photos, few_steps, tmp_path_factory):
    folder, events = tmp_path_factory.mktemp("runs") / "dog", []
    changes = {
        "num_validation_images": 2,
        "validation_steps": 2,
        "checkpointing_steps": 2,
        "report_to": "tensorboard",
    }
    # a sample shows it
    changes |= {"checkpoints_total_limit": 2, "hub_token": "hf_secret", "learning_rate": 0.3}
    return folder, events, train(tiny_config(tiny_base, photos, folder, **changes), events.append)


def test_the_run_folder_and_its_events_are_what_the_design_says(shown_run):
    folder, events, result = shown_run
    names = (
        "pytorch_lora_weights.safetensors dog.kohya.safetensors README.md train_config.json "
        "metrics.jsonl samples "
    )
    names += "checkpoint-2 checkpoint-4 last contact_sheet.png loss.png logs"
    names = {*names.split(), *(f"image_{n}.png" for n in range(6))}
    assert {path.name for path in folder.iterdir()} == names
    sample_names = sorted(path.name for path in (folder / "samples").iterdir())
    assert sample_names == [f"step_{step:06d}_{n}.png" for step in (0, 2, 4, 5) for n in (0, 1)]
    assert result.proof.max_relative_difference < 1e-5
    assert (
        json.loads(json.dumps([build_record(event) for event in events]))
        == RunDir(folder).read_events()
    )
    assert events[0].kind == "start" and events[0].max_train_steps == 5
    assert [event.step for event in steps(events)] == [1, 2, 3, 4, 5]
    keys = {
        "loss",
        "loss_instance",
        "loss_prior",
        "lr",
        "step_sec",
        "eta_sec",
        "memory_gib",
        "grad_norm",
    }
    assert keys <= set(build_record(steps(events)[0]))
    samples = [event for event in events if event.kind == "sample"]
    assert [event.step for event in samples] == [0, 2, 4, 5]
    assert len({tuple(event.seeds) for event in samples}) == 1
    assert events[-1].kind == "end" and events[-1].state == "done"


@pytest.mark.parametrize(("step", "with_adapter"), [(0, False), (5, True)])
def test_samples_differ_between_steps_only_by_the_adapter(step, with_adapter, shown_run, tiny_base):
    """An untouched pipeline draws the first ones as it is, and the last ones once it has loaded the
    folder."""
    folder, events, _ = shown_run
    sample = next(event for event in events if event.kind == "sample" and event.step == step)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_base)
    pipeline.set_progress_bar_config(disable=True)
    if with_adapter:
        pipeline.load_lora_weights(str(folder))
    options = {"num_inference_steps": 25, "guidance_scale": 5.0, "height": 64, "width": 64}
    generator = torch.Generator().manual_seed(sample.seeds[0])
    pixels = np.asarray(pipeline(sample.prompts[0], generator=generator, **options).images[0])
    names = sample.files[0], f"samples/step_{5 - step:06d}_0.png"
    assert [has_difference(np.asarray(Image.open(folder / name)), pixels) for name in names] == [
        False,
        True,
    ]


def test_saved_config_trains_equally_and_holds_no_secrets(shown_run, photos, tmp_path):
    folder, _, _ = shown_run
    for path in (folder / "README.md", *folder.glob("*.safetensors")):
        content = path.read_bytes()
        assert str(photos).encode() not in content and str(folder.parent).encode() not in content
    assert not any(
        "hf_secret" in (folder / name).read_text()
        for name in ("train_config.json", "metrics.jsonl")
    )
    written = json.loads((folder / "train_config.json").read_text())
    quiet = {"output_dir": str(tmp_path), "num_validation_images": 0, "report_to": "none"}
    train(TrainConfig.from_dict({**written, **quiet}))
    assert adapter_sha256(tmp_path) == adapter_sha256(folder)


def test_eta_counts_steps_without_samples_and_scores(run, monkeypatch):
    """By a clock that goes on by a second when it is asked, and by an hour for pictures."""
    now = count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(loop.Training, "sample_when_due", lambda self: deque(islice(now, 3600), 0))
    times = [(event.step_sec, event.eta_sec) for event in steps(run(max_train_steps=3)[0])]
    assert times == [(1, 2), (1, 1), (1, 0)]


@pytest.fixture
def train_steps(monkeypatch):
    """The TrainStep of each training, as it was left."""
    steps_made, original = [], TrainStep.__init__

    def note(self, *arguments, **options):
        original(self, *arguments, **options)
        steps_made.append(self)

    monkeypatch.setattr(TrainStep, "__init__", note)
    return steps_made


def test_the_adapter_lowers_the_loss_on_equal_noise(tiny_base, tmp_path, train_steps):
    photos, attention = (
        paint_photos(tmp_path / "photos", count=1),
        ("to_q", "to_k", "to_v", "to_out.0"),
    )
    size = {"rank": 16, "train_batch_size": 4, "max_train_steps": 40, "target_modules": attention}
    train(tiny_config(tiny_base, photos, tmp_path / "run", **size))
    step = train_steps[0]

    def losses() -> float:
        passes = step.iterate_chunks(range(1000, 1008))
        return sum(
            float(of.total) for micros, share in passes for of in step.compute_losses(micros, share)
        )

    with torch.no_grad():
        trained = losses()
        with moslora.disable_adapters(step.components["unet"]):
            untrained = losses()
    assert trained < 0.95 * untrained  # 0.89 was seen


def test_checkpointing_and_disk_cache_keep_results_equal(run, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    changes = {"gradient_checkpointing": True, "caching": "disk"}
    assert run("a", max_train_steps=2)[1] == run("b", max_train_steps=2, **changes)[1]


class RunResults:
    """What a run of two steps left: its steps, the raw adapter's tensors by their last name, the
    optimizer's states."""

    def __init__(self, folder):
        self.steps = filter_events(StepDone, RunDir(folder).read_events())
        self.loss, self.lr = self.steps[0].loss, [step.lr for step in self.steps]
        checkpoint, by_kind = RunDir(folder).find_latest_checkpoint(), defaultdict(list)
        raw, self.facts = raw_file.read_raw(checkpoint / "moslora_weights.safetensors")
        for name, tensor in raw.items():
            by_kind[name.rpartition(".")[2]].append(tensor)
        self.modules = {name.split(".")[0] for name in raw}
        self.tensors = {
            kind: torch.cat([t.flatten() for t in parts]) for kind, parts in by_kind.items()
        }
        self.states = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        self.is_8_bit = any(
            "__bnb_optimizer_quant_state__" in state for state in self.states["state"].values()
        )
        self.is_orthogonal = all(
            torch.allclose(t @ t.T, torch.eye(len(t)), atol=1e-5) for t in by_kind["mixer"]
        )

    def size(self, kind):
        return float(self.tensors[kind].norm())

    def has_far_mixers(self, other_run):
        return not torch.allclose(self.tensors["mixer"], other_run.tensors["mixer"], atol=0.02)


def has_later_loss_change(results, plain):
    return results.loss == plain.loss and results.steps[1].loss != plain.steps[1].loss


def is_clipped(results, plain):
    return (
        results.size("lora_B") < plain.size("lora_B") / 10
        and results.steps[0].grad_norm == plain.steps[0].grad_norm
    )


def check_recorded_settings(results, plain):
    """What the files say."""
    assert 2 * len(results.tensors["lora_A"]) == len(plain.tensors["lora_A"])
    assert results.tensors.keys() > plain.tensors.keys()
    assert (results.facts.mixer, results.facts.alpha, results.facts.use_rslora) == (
        "identity",
        8,
        True,
    )
    assert results.loss == plain.loss
    return results.lr[1] < results.lr[0] == plain.lr[0]


RECORDED = {"rank": 2, "mixer": "identity", "lora_alpha": 8, "use_rslora": True, "use_dora": True}
RECORDED |= {"lr_scheduler": "cosine", "lr_warmup_steps": 1}
TEXT = {"text_encoder", "text_encoder_2"}
ROUNDED = (
    ("bf16", {"mixed_precision": "bf16"}),
    ("nf4", {"base_quantization": "nf4"}),
    ("int8", {"base_quantization": "int8"}),
)
OPTIONS = {
    "rank, mixer, alpha, rslora, dora, cosine": (RECORDED, check_recorded_settings),
    "frozen mixer": (
        {"train_mixer": False},
        lambda results, plain: results.is_orthogonal and not plain.is_orthogonal,
    ),
    "mixer_lr_scale": (
        {"mixer_lr_scale": 10.0},
        lambda results, plain: results.has_far_mixers(plain),
    ),
    "dropout": ({"lora_dropout": 0.5}, has_later_loss_change),  # nothing to drop while B is zero
    **{
        name: (changes, lambda results, plain: 0 < abs(results.loss / plain.loss - 1) < 0.05)
        for name, changes in ROUNDED
    },
    "text encoder": (
        {"train_text_encoder": True},
        lambda results, plain: results.modules - plain.modules == TEXT,
    ),
    "8-bit": ({"use_8bit_adam": True, "rank": 128}, lambda results, plain: results.is_8_bit),
    "clipping": ({"max_grad_norm": 1e-6, "adam_epsilon": 1e-4}, is_clipped),
    "weight decay": (
        {"adam_weight_decay": 5.0},
        lambda results, plain: results.size("lora_A") < 0.97 * plain.size("lora_A"),
    ),
}
"""Changes, and what they must show beside the run without them."""


@pytest.fixture(scope="module")
def plain_run(tiny_base, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    train(tiny_config(tiny_base, photos, folder, max_train_steps=2))
    return RunResults(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_acts_as_its_name_says_and_stays_finite(name, run, plain_run, tmp_path):
    changes, acts = OPTIONS[name]
    run(max_train_steps=2, **changes)
    results = RunResults(tmp_path / "run")
    assert all(math.isfinite(step.loss) for step in results.steps) and acts(results, plain_run)


@pytest.fixture
def prepare_step(tiny_base, photos, tmp_path, monkeypatch):
    """Prepare a run with changes; returns its TrainStep before the first step."""
    monkeypatch.setattr(loop, "run_training_loop", lambda run: run.train_step)
    return lambda base=tiny_base, **changes: train(
        tiny_config(base, photos, tmp_path / "run", **changes)
    )


def test_noise_is_drawn_from_the_seed_and_offset_by_channel(prepare_step):
    plain, shifted = (
        prepare_step(noise_offset=strength, seed=4).build_micro_batch(0).target
        for strength in (0, 0.1)
    )
    names = (4, "micro", 0)
    assert torch.equal(plain, torch.randn(plain.shape, generator=seed_generator(*names, "noise")))
    offsets = torch.randn(1, 4, 1, 1, generator=seed_generator(*names, "noise offset"))
    torch.testing.assert_close(shifted - plain, (0.1 * offsets).expand_as(plain))


@pytest.mark.parametrize(
    ("changes", "weigh"),
    [
        ({"snr_gamma": 1e-3}, lambda snr: min(snr, 1e-3) / snr),
        ({"debiased_estimation_loss": True}, lambda snr: min(snr, 1000) ** -0.5),
        ({"do_edm_style_training": True}, lambda snr: 1),  # another output, the same loss
    ],
)
def test_loss_of_a_run_is_weighted_as_its_settings_say(changes, weigh, prepare_step):
    losses = []
    for settings in ({}, changes):
        step = prepare_step(**settings)
        micro_batch = step.build_micro_batch(0)
        losses.append(step.compute_losses([micro_batch])[0].total.item())
    assert step.schedule.style == ("edm" if "do_edm_style_training" in changes else "ddpm")
    snr = float(step.schedule.snr(micro_batch.inputs.noisy_sample.timestep_indices))
    assert losses[1] == pytest.approx(losses[0] * weigh(snr), rel=1e-3)


def test_center_crop_takes_the_middle_of_each_photo(prepare_step):
    step = prepare_step(center_crop=True)
    time_ids = [step.build_micro_batch(n).inputs.photo_inputs["time_ids"][0] for n in range(9)]
    corners = {(tuple(ids[:2].int().tolist()), tuple(ids[2:4].int().tolist())) for ids in time_ids}
    assert corners == {((64, 96), (0, 16)), ((80, 64), (8, 0)), ((72, 72), (0, 0))}


def test_a_v_prediction_base_is_trained_on_velocity(tmp_path, prepare_step):
    base = save_tiny_sdxl(tmp_path / "base", prediction_type="v_prediction")
    micro_batch = prepare_step(base).build_micro_batch(0)
    noisy, target = micro_batch.inputs.noisy_sample, micro_batch.target

    # Of z = sqrt(a)·x + sqrt(1 - a)·n and v = sqrt(a)·n - sqrt(1 - a)·x, the noise.
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    alpha = scheduler.alphas_cumprod[noisy.timestep_indices].view(-1, 1, 1, 1)
    noise = (1 - alpha).sqrt() * noisy.latents + alpha.sqrt() * target
    drawn_noise = torch.randn(target.shape, generator=seed_generator(3, "micro", 0, "noise"))
    torch.testing.assert_close(noise, drawn_noise, atol=1e-5, rtol=1e-4)


def test_prior_losses_are_logged_and_class_prompts_alternate(run, tiny_base, photos, tmp_path):
    events, _ = run(with_prior_preservation=True, prior_loss_weight=0.5, max_train_steps=2)
    for event in steps(events):
        assert event.loss == pytest.approx(event.loss_instance + 0.5 * event.loss_prior, rel=1e-5)
    config = tiny_config(tiny_base, photos, tmp_path, prior_prompts=("a car", "a cup"))
    classes = [config.class_prompt] * 50
    counts = Counter(
        prompt for turn in (0, 1) for prompt in sample_prior_prompts(config, classes, turn)
    )
    assert (
        35 < counts["a photo of a dog"] < 65
        and min(counts["a car"], counts["a cup"]) > 10
        and len(counts) == 3
    )


def test_first_adapter_off_prior_loss_is_zero(run):
    prior = {
        "with_prior_preservation": True,
        "prior": "adapter_off",
        "train_batch_size": 4,
        "max_train_steps": 3,
    }
    digests = set()
    for name, prior_prompts in (("plain", ()), ("others", ("a red car in the snow", "a cup"))):
        events, digest = run(name, **prior, prior_prompts=prior_prompts)
        losses = [event.loss_prior for event in steps(events)]
        assert losses[0] < 1e-9 < losses[2]
        digests.add(digest)
    assert len(digests) == 2


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(run, monkeypatch, tmp_path):
    step, bad = TrainStep.accumulate_gradients, torch.full((3,), float("nan"))
    monkeypatch.setattr(
        TrainStep, "accumulate_gradients", lambda self: step(self) if self.step < 2 else bad
    )
    with pytest.raises(UserError, match="at step 3: lower learning_rate"):
        run(checkpointing_steps=2)
    end = RunDir(tmp_path / "run").read_events()[-1]
    assert (end["state"], end["step"]) == ("failed", 2)
    assert RunDir(tmp_path / "run").find_latest_checkpoint().name == "checkpoint-2"


def test_bf16_run_frees_encoders_and_keeps_fp32_inputs(
    tiny_base, tmp_path, monkeypatch, train_steps
):
    """bf16 has eight bits: a photo of 1365 px would be one of 1368."""
    inputs_seen, forward = [], UNet2DConditionModel.forward
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (1365, 683)).save(tmp_path / "photos" / "wide.png")

    def look(self, *arguments, added_cond_kwargs, **options):
        inputs_seen.append(added_cond_kwargs["time_ids"][0, :2].tolist())
        return forward(self, *arguments, added_cond_kwargs=added_cond_kwargs, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", look)
    changes = {"mixed_precision": "bf16", "caching": "off", "max_train_steps": 1}
    train(tiny_config(tiny_base, tmp_path / "photos", tmp_path / "run", **changes))
    assert inputs_seen == [[683, 1365]]
    pipeline = train_steps[0].inputs.pipeline
    assert pipeline.text_encoder is None and pipeline.text_encoder_2 is None
    assert pipeline.unet.dtype == torch.bfloat16 and pipeline.vae.dtype == torch.float32
    assert {p.dtype for p in train_steps[0].parameters} == {torch.float32}


@pytest.fixture
def config(tiny_base, photos, tmp_path):
    return tiny_config(tiny_base, photos, tmp_path / "run", max_train_steps=1)


def test_a_tracker_that_fails_at_the_end_loses_no_finished_run(config, monkeypatch, caplog):
    def fail(*_):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(Accelerator, "end_training", fail)
    assert train(config).proof is not None
    assert "--report_to: ending it failed: ConnectionError no network" in caplog.text


@pytest.mark.parametrize(
    ("weight_decay", "says", "checkpoint_names"),
    [
        (1e38, "the adapter is not finite after step 1", []),
        (1e30, "the gradient is nan at step 2", ["checkpoint-1"]),
    ],
)
def test_an_adapter_that_is_not_finite_becomes_no_checkpoint(
    weight_decay, says, checkpoint_names, config
):
    """The loss before a step knows nothing of what that step does: here it overflows."""
    sizes = {
        "adam_weight_decay": weight_decay,
        "learning_rate": 1e2,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
    }
    with pytest.raises(UserError, match=f"{says}: lower learning_rate"):
        train(replace(config, **sizes))
    assert [path.name for path in RunDir(config.output_dir).list_checkpoints()] == checkpoint_names


HOLD = """
import sys
from pathlib import Path
from dreambooth_moslora.disk.queue import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_folder_of_a_live_run_is_refused_after_a_kill_not(tiny_base, photos, tmp_path):
    pytest.importorskip("fcntl")
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(UserError, match="another process is training there"):
            train(tiny_config(tiny_base, photos, tmp_path))
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        holder.kill()
    with lock_folder(tmp_path):
        assert LOCK_NAME in os.listdir(tmp_path)
    assert LOCK_NAME not in os.listdir(tmp_path)
    for _ in range(2):
        with (
            lock_folder(tmp_path),
            pytest.raises(UserError, match="is training there"),
            lock_folder(tmp_path),
        ):
            pass
