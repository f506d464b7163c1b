"""Whole small trainings on the tiny base: what they leave, what they learn, and that every option really acts."""

import json
import math
import shutil
from collections import Counter

import pytest
import torch
from diffusers import EDMEulerScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from dreambooth_moslora.adapters.moslora import disabled
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.events import StepDone, record_of
from dreambooth_moslora.core.run_folder import RunDir
from dreambooth_moslora.training import train_step as train_step_module
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.train_step import StepLosses
from tests.helpers.tiny import save_tiny_sdxl
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return paint_photos(tmp_path_factory.mktemp("photos"))


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
        "checkpoint-4",
        "checkpoint-5",
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


def test_samples_differ_between_steps_only_by_the_adapter(shown_run):
    folder = shown_run[0] / "samples"
    first, last = ((folder / f"step_{step:06d}_0.png").read_bytes() for step in (0, 5))
    assert first != last


def test_an_untouched_pipeline_loads_the_folder_and_draws_the_last_sample(shown_run, tiny_base):
    folder, events, _ = shown_run
    sample = [event for event in events if event.kind == "sample"][-1]
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(folder))
    options = {"num_inference_steps": 25, "guidance_scale": 5.0, "height": 64, "width": 64}
    generator = torch.Generator().manual_seed(sample.seeds[0])
    drawn = pipeline(sample.prompts[0], generator=generator, **options).images[0]
    saved = Image.open(folder / sample.files[0])
    ours, theirs = (torch.tensor(list(image.convert("RGB").tobytes())).int() for image in (saved, drawn))
    assert (ours - theirs).abs().max() <= 2


def test_nothing_private_is_in_what_is_shared(shown_run, photos):
    folder, _, _ = shown_run
    shared = [folder / "README.md", *folder.glob("*.safetensors")]
    for path in shared:
        content = path.read_bytes()
        assert str(photos).encode() not in content and str(folder.parent).encode() not in content
    for path in (folder / "train_config.json", folder / "metrics.jsonl"):
        assert "hf_secret" not in path.read_text()


def test_the_config_that_was_written_trains_the_same(shown_run, tmp_path):
    from dreambooth_moslora.core.config import TrainConfig

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


OPTIONS = {
    "seed": {"seed": 4},
    "rank": {"rank": 2},
    "mixer": {"mixer": "identity"},
    "frozen mixer": {"train_mixer": False},
    "mixer_lr_scale": {"mixer_lr_scale": 10.0},
    "alpha": {"lora_alpha": 8},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.5},
    "snr_gamma": {"snr_gamma": 0.1},
    "timestep bias": {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 1e3},
    "edm": {"do_edm_style_training": True},
    "bf16": {"mixed_precision": "bf16"},
    "nf4": {"base_quantization": "nf4"},
    "adapter_off": {"with_prior_preservation": True, "prior": "adapter_off"},
    "text encoder": {"train_text_encoder": True},
    "8-bit": {"use_8bit_adam": True, "rank": 128},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "cosine": {"lr_scheduler": "cosine", "lr_warmup_steps": 1},
    "clipping": {"max_grad_norm": 1e-6, "adam_epsilon": 1e-4},
    "weight decay": {"adam_weight_decay": 5.0},
    "scale_lr": {"scale_lr": True, "train_batch_size": 2},
    "center_crop": {"center_crop": True},
    "interpolation": {"image_interpolation_mode": "nearest"},
}


@pytest.fixture(scope="module")
def plain_hash(tiny_base, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    train(tiny_config(tiny_base, photos, folder, max_train_steps=2))
    return adapter_sha256(folder)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_acts_and_stays_finite(name, run, plain_hash):
    events, digest = run(max_train_steps=2, **OPTIONS[name])
    assert all(math.isfinite(event.loss) for event in steps(events))
    assert digest != plain_hash


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


def test_a_v_prediction_base_is_trained_on_velocity(tmp_path, photos, plain_hash):
    base = save_tiny_sdxl(tmp_path / "base", prediction_type="v_prediction")
    train(tiny_config(base, photos, tmp_path / "run", max_train_steps=2))
    assert adapter_sha256(tmp_path / "run") != plain_hash


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
    config = tiny_config(tiny_base, photos, tmp_path, prior_prompts=("a car", "a cup"), train_batch_size=50)
    drawn = Counter(train_step_module.prior_prompts(config, 0) + train_step_module.prior_prompts(config, 1))
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
