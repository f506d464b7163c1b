"""Stop at any step and resume: the same bytes in the final adapter as a run that was never interrupted."""

import shutil

import pytest

from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.training.checkpoint import archive_checkpoints_after, find_checkpoint
from dreambooth_moslora.training.dry_run import describe_run
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config

pytestmark = pytest.mark.usefixtures("few_steps")

KINDS = {
    "plain": {"random_flip": True},
    "class_images_and_captions": {
        "with_prior_preservation": True,
        "instance_prompt": "sks dog, red, round, on grass",
        "shuffle_caption": True,
        "keep_tokens": 1,
        "caption_dropout": 0.4,
    },
    "accumulation_and_convolutions": {
        "gradient_accumulation_steps": 3,
        "train_batch_size": 2,
        "target_modules": ("to_q", "conv1", "conv_shortcut"),
    },
    "text_encoder_dropout_and_dora": {
        "train_text_encoder": True,
        "with_prior_preservation": True,
        "prior": "adapter_off",
        "lora_dropout": 0.3,
        "use_dora": True,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
    },
    "buckets_and_adafactor": {
        "enable_bucket": True,
        "train_batch_size": 2,
        "crops_per_photo": 2,
        "caching": "disk",
        "optimizer": "Adafactor",
        "target_modules": ("to_q", "conv1"),
    },
    "prodigy_uncached": {"optimizer": "Prodigy", "learning_rate": 1.0, "caching": "off", "crops_per_photo": 2},
    "schedule_free": {"optimizer": "AdamWScheduleFree", "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2},
    "adam_8bit_in_bf16": {
        "use_8bit_adam": True,
        "rank": 128,
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
    },
}
NEEDS = {"schedule_free": [pytest.mark.extra("schedulefree")]}
AT_THREE_STEPS = ("plain", "class_images_and_captions", "accumulation_and_convolutions")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return paint_photos(tmp_path_factory.mktemp("photos"))


def stop_at(step: int):
    """(should_stop, on_event): the second hears the events, the first says so once `step` is done."""
    done = []
    return (lambda: step in done), (lambda event: done.append(event.step if event.kind == "step" else None))


@pytest.mark.parametrize(
    "kind", [k if k == "plain" else pytest.param(k, marks=[pytest.mark.slow, *NEEDS.get(k, [])]) for k in KINDS]
)
def test_interrupted_and_resumed_equals_unbroken(kind, tiny_base, photos, tmp_path):
    def config(**changes):
        return tiny_config(tiny_base, photos, tmp_path / "run", max_train_steps=4, **KINDS[kind], **changes)

    train(config())
    unbroken = adapter_sha256(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    for step in (1, 2, 3) if kind in AT_THREE_STEPS else (2,):
        should_stop, on_event = stop_at(step)
        result = train(config(resume_from_checkpoint="latest"), on_event, should_stop)
        assert result.interrupted and result.step == step
        assert adapter_sha256(tmp_path / "run") != unbroken
        assert RunDir(tmp_path / "run").latest_checkpoint().name == "last"
    result = train(config(resume_from_checkpoint="latest"))
    assert not result.interrupted and result.step == 4
    assert adapter_sha256(tmp_path / "run") == unbroken


def test_the_share_of_the_bare_prompt_is_resumed_and_said(tiny_base, photos, tmp_path, caplog):
    placed = shutil.copytree(photos, tmp_path / "placed")
    for path in sorted(placed.glob("*.png")):
        path.with_suffix(".txt").write_text("a photo of sks dog on grass")

    def config(name, **changes):
        return tiny_config(tiny_base, placed, tmp_path / name, max_train_steps=4, seed=1, **changes)

    with caplog.at_level("INFO"):
        train(config("half", instance_prompt_share=0.5))
    assert any("50% of their exposures show it (--instance_prompt_share)" in line for line in caplog.messages)
    train(config("never", instance_prompt_share=0))
    should_stop, on_event = stop_at(2)
    train(config("torn", instance_prompt_share=0.5), on_event, should_stop)
    train(config("torn", instance_prompt_share=0.5, resume_from_checkpoint="latest"))
    half, torn, never = (adapter_sha256(tmp_path / name) for name in ("half", "torn", "never"))
    assert torn == half != never


@pytest.mark.slow
def test_the_metrics_of_a_resumed_run_have_each_step_once_and_a_new_learning_rate(tiny_base, photos, tmp_path):
    should_stop, on_event = stop_at(2)
    train(tiny_config(tiny_base, photos, tmp_path), on_event, should_stop)
    train(tiny_config(tiny_base, photos, tmp_path, learning_rate=5e-3, resume_from_checkpoint="latest"))
    events = RunDir(tmp_path).read_metrics()
    steps = [(event["step"], event["lr"]) for event in events if event["type"] == "step"]
    assert steps == [(1, 1e-2), (2, 1e-2), (3, 5e-3), (4, 5e-3), (5, 5e-3)]
    assert [event["state"] for event in events if event["type"] == "end"] == ["done"]


@pytest.mark.slow
def test_a_run_without_a_seed_is_resumed_with_the_seed_it_drew(tiny_base, photos, tmp_path):
    def config(**changes):
        return tiny_config(tiny_base, photos, tmp_path / "run", **changes)

    should_stop, on_event = stop_at(2)
    train(config(seed=None), on_event, should_stop)
    drawn = RunDir(tmp_path / "run").read_metrics()[0]["config"]["seed"]
    train(config(seed=None, resume_from_checkpoint="latest"))
    resumed = adapter_sha256(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    train(config(seed=drawn))
    assert adapter_sha256(tmp_path / "run") == resumed


@pytest.mark.slow
def test_a_finished_run_can_be_trained_further(tiny_base, photos, tmp_path):
    train(tiny_config(tiny_base, photos, tmp_path / "a", max_train_steps=3))
    train(tiny_config(tiny_base, photos, tmp_path / "a", resume_from_checkpoint="latest"))
    train(tiny_config(tiny_base, photos, tmp_path / "b"))
    assert adapter_sha256(tmp_path / "a") == adapter_sha256(tmp_path / "b")


def test_a_new_run_in_an_old_folder_sets_the_old_one_aside(tiny_base, photos, tmp_path):
    train(tiny_config(tiny_base, photos, tmp_path, max_train_steps=2))
    old = adapter_sha256(tmp_path)
    train(tiny_config(tiny_base, photos, tmp_path, max_train_steps=1))
    assert adapter_sha256(tmp_path / "earlier_run_1") == old
    assert [path.name for path in RunDir(tmp_path).checkpoints()] == ["last"]


def test_latest_without_a_checkpoint_begins_anew_and_says_so(tiny_base, photos, tmp_path, caplog):
    config = tiny_config(tiny_base, photos, tmp_path, resume_from_checkpoint="latest")
    assert train(config).step == 5
    assert f"latest: no complete checkpoint in {tmp_path}; starting at step 0" in caplog.text
    assert train(config).step == 5 and caplog.text.count("starting at step 0") == 1


def test_a_dry_run_says_that_there_is_no_checkpoint_and_names_what_is_not_complete(tiny_base, photos, tmp_path, caplog):
    (tmp_path / "checkpoint-4").mkdir()
    describe_run(tiny_config(tiny_base, photos, tmp_path, resume_from_checkpoint="latest"))
    assert "(checkpoint-4: not complete, or another program's); starting at step 0" in caplog.text


@pytest.mark.slow
def test_an_older_checkpoint_sets_the_later_ones_aside(tiny_base, photos, tmp_path):
    def config(folder, **changes):
        return tiny_config(tiny_base, photos, tmp_path / folder, checkpointing_steps=1, **changes)

    train(config("run"))
    limit = {"checkpoints_total_limit": 2, "learning_rate": 2e-2, "max_train_steps": 4}
    train(config("run", resume_from_checkpoint="checkpoint-2", **limit))
    assert [path.name for path in RunDir(tmp_path / "run").checkpoints()] == ["checkpoint-3", "checkpoint-4"]
    aside = tmp_path / "run" / "earlier_run_1"
    assert sorted(path.name for path in aside.iterdir()) == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    names = ("checkpoint-4/moslora_weights.safetensors", "checkpoint-4/optimizer.pt")
    assert all((aside / name).read_bytes() != (tmp_path / "run" / name).read_bytes() for name in names)


def names_of(folder):
    return [path.name for path in RunDir(folder).checkpoints()]


@pytest.mark.slow
def test_numbered_checkpoints_are_those_of_diffusers_script_and_the_end_is_called_last(tiny_base, photos, tmp_path):
    """Multiples of `--checkpointing_steps`, the newest `--checkpoints_total_limit` of them."""

    def go(steps, **changes):
        every = {"checkpointing_steps": 2, "checkpoints_total_limit": 2, "max_train_steps": steps}
        train(tiny_config(tiny_base, photos, tmp_path / "run", **every | changes))

    should_stop, on_event = stop_at(3)
    every = {"checkpointing_steps": 2, "checkpoints_total_limit": 2, "max_train_steps": 7}
    train(tiny_config(tiny_base, photos, tmp_path / "run", **every), on_event, should_stop)
    assert names_of(tmp_path / "run") == ["checkpoint-2", "last"]
    go(7, resume_from_checkpoint="latest")
    assert names_of(tmp_path / "run") == ["checkpoint-4", "checkpoint-6", "last"]
    seven = adapter_sha256(tmp_path / "run")
    go(8, resume_from_checkpoint="latest")
    assert names_of(tmp_path / "run") == ["checkpoint-6", "checkpoint-8"]
    steps = [e["step"] for e in RunDir(tmp_path / "run").read_metrics() if e["type"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    go(7, resume_from_checkpoint="checkpoint-6")
    assert names_of(tmp_path / "run") == ["checkpoint-6", "last"] and adapter_sha256(tmp_path / "run") == seven
    go(7, resume_from_checkpoint="checkpoint-6")
    assert (tmp_path / "run" / "earlier_run_2" / "last" / "position.json").is_file()


def test_latest_passes_by_a_damaged_last(tiny_base, photos, tmp_path, caplog):
    train(tiny_config(tiny_base, photos, tmp_path, max_train_steps=3, checkpointing_steps=2))
    (tmp_path / "last" / "position.json").write_text("{}")
    run = RunDir(tmp_path)
    assert find_checkpoint(run, "latest") == run.checkpoint_path(2)
    (tmp_path / "last" / "optimizer.pt").unlink()
    assert run.checkpoints() == [run.checkpoint_path(2)]


def test_a_best_step_that_will_be_done_again_goes_aside_and_an_earlier_one_stays(tmp_path):
    run = RunDir(tmp_path)
    run.best_dir.mkdir()
    run.append_metrics({"type": "evaluation", "step": 4, "best": {"step": 3, "score": 1.0, "since": 1}})
    archive_checkpoints_after(run, 3)
    assert run.best_dir.is_dir()
    archive_checkpoints_after(run, 2)
    assert not run.best_dir.exists() and (tmp_path / "earlier_run_1" / "best").is_dir()
