"""Stop and resume: the published files are those of a run that was never interrupted, byte for byte.

`KINDS` is the matrix: a feature whose state a checkpoint has to keep is a row of it.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.training.checkpoint import archive_checkpoints_after, find_checkpoint
from dreambooth_moslora.training.dry_run import describe_run
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config

pytestmark = pytest.mark.usefixtures("few_steps")

DOG = {"instance_data_dir": "photos", "instance_prompt": "a photo of sks dog", "class_prompt": "a photo of a dog"}
CAT = {"instance_data_dir": "cat", "instance_prompt": "a photo of zwx cat", "class_prompt": "a photo of a cat"}
CLASS_IMAGES = {"with_prior_preservation": True}
BASE_PRIOR = {"with_prior_preservation": True, "prior": "adapter_off"}
WARM, TWO_CROPS = {"lr_warmup_steps": 2}, {"crops_per_photo": 2}
TAGS = {"instance_prompt": "sks dog, red, round, on grass", "shuffle_caption": True, "keep_tokens": 1}
BUCKETS = {"enable_bucket": True, "train_batch_size": 2, "caching": "disk", **TWO_CROPS}
SIZES = {"enable_bucket": True, "bucket_reso_steps": 16, "num_class_images": 5, "sample_batch_size": 1}
CONVOLUTIONS = {"target_modules": ("to_q", "conv1", "conv_shortcut")}
BASIS = {"basis": "svd", "rank": 3, "lora_alpha": 2, "target_modules": ("to_q", "conv1"), "learning_rate": 0.3}
TEXT = {"train_text_encoder": True, "lora_dropout": 0.3, "use_dora": True, "lr_scheduler": "cosine"}
BITS_8 = {"use_8bit_adam": True, "rank": 128}
KINDS = {
    "plain": {"random_flip": True},
    "bare_prompt": {"instance_data_dir": "placed", "instance_prompt_share": 0.5, "seed": 1},
    "class_images_and_captions": CLASS_IMAGES | TAGS | {"caption_dropout": 0.4},
    "accumulation_and_convolutions": CONVOLUTIONS | {"gradient_accumulation_steps": 3, "train_batch_size": 2},
    "text_encoder_dropout_and_dora": BASE_PRIOR | WARM | TEXT,
    "buckets_and_adafactor": BUCKETS | CONVOLUTIONS | {"optimizer": "Adafactor"},
    "prodigy_uncached": TWO_CROPS | {"optimizer": "Prodigy", "learning_rate": 1.0, "caching": "off"},
    "schedule_free": WARM | {"optimizer": "AdamWScheduleFree", "lr_scheduler": "constant_with_warmup"},
    "adam_8bit_in_bf16": BITS_8 | {"mixed_precision": "bf16", "gradient_checkpointing": True},
    "average": {"use_ema": True},
    "basis": BASIS,
    "new_tokens_and_average": BASE_PRIOR | {"train_text_encoder_ti": True, "use_ema": True},
    "several_subjects": CLASS_IMAGES | {"subjects": [DOG, CAT]},
    "new_tokens_of_several_subjects": {"subjects": [DOG, CAT], "train_text_encoder_ti": True},
    "class_images_of_several_sizes": CLASS_IMAGES | SIZES | {"max_train_steps": 2},
}
NEEDS = {"schedule_free": [pytest.mark.extra("schedulefree")]}
FAST = ("plain", "bare_prompt")
STOPS = {
    **dict.fromkeys(("plain", "class_images_and_captions", "accumulation_and_convolutions"), (1, 2, 3)),
    **dict.fromkeys(("new_tokens_and_average", "new_tokens_of_several_subjects"), (1, 3)),  # the pivot is step 2
    **dict.fromkeys(("text_encoder_dropout_and_dora", "schedule_free"), (1,)),  # step 2 has the whole learning rate
    "class_images_of_several_sizes": (0,),
}
"""After which steps a run is stopped, if not after the second alone. Step 0: while class images are drawn."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Beside it are `cat` with one photo, and `placed` with captions that name a place."""
    folder = tmp_path_factory.mktemp("photos")
    paint_photos(folder / "cat", 1)
    for path in paint_photos(folder / "placed").iterdir():
        path.with_suffix(".txt").write_text("a photo of sks dog on grass")
    return paint_photos(folder / "photos")


def stop_at(step: int):
    """(on_event, should_stop): the first hears the events, the second says so once `step` is done."""
    done = []
    return (lambda event: done.append(event.step if event.kind == "step" else None)), (lambda: step in done)


def left_by(folder: Path) -> dict[str, bytes]:
    """The published files and the class images, whole."""
    found = [*folder.glob("*.safetensors"), *RunDir(folder).class_images_dir.rglob("*.*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize(
    "kind", [k if k in FAST else pytest.param(k, marks=[pytest.mark.slow, *NEEDS.get(k, [])]) for k in KINDS]
)
def test_interrupted_and_resumed_equals_unbroken(kind, tiny_base, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos.parent)
    config = tiny_config(tiny_base, photos, tmp_path / "run", **{"max_train_steps": 4, **KINDS[kind]})
    again, run = replace(config, resume_from_checkpoint="latest"), RunDir(tmp_path / "run")
    train(config)
    unbroken = left_by(run.path)
    shutil.rmtree(run.path)
    for step in STOPS.get(kind, (2,)):
        heard = stop_at(step) if step else (None, lambda: len([*run.class_images_dir.glob("*.png")]) > 1)
        result = train(again, *heard)
        assert result.interrupted and result.step == step
        found = left_by(run.path)
        assert found != unbroken and found.keys() <= unbroken.keys()
        assert not step or run.latest_checkpoint().name == "last"
    result = train(again)
    assert not result.interrupted and result.step == config.max_train_steps
    assert left_by(run.path) == unbroken


@pytest.mark.slow
def test_two_processes_that_are_stopped_and_go_on_equal_two_unbroken_ones(tiny_base, photos, tmp_path, play):
    """The second hears the signal in its second step."""
    settings = {"max_train_steps": 4, **KINDS["class_images_and_captions"]}
    whole, torn = (tiny_config(tiny_base, photos, tmp_path / name / "run", **settings) for name in ("whole", "torn"))
    stopped = {"config": torn, "place": "averaged", "rank": 1, "after": 1, "end": "stop"}
    scenes = [{"config": whole}, stopped, {"config": replace(torn, resume_from_checkpoint="latest")}]
    ended, both = play(scenes)
    for played in both:
        assert [scene["code"] for scene in played] == [0, 130, 0], ended
        assert [scene["averaged"] for scene in played[1:]] == [[0, 1], [2, 3]]
    assert left_by(tmp_path / "torn" / "run") == left_by(tmp_path / "whole" / "run") != {}


def test_the_share_of_the_bare_prompt_counts_and_is_said(tiny_base, photos, tmp_path, caplog):
    def config(share: float):
        placed = photos.with_name("placed")
        given = {"max_train_steps": 4, "seed": 1, "instance_prompt_share": share}
        return tiny_config(tiny_base, placed, tmp_path / str(share), **given)

    with caplog.at_level("INFO"):
        train(config(0.5))
    assert any("50% of their exposures show it (--instance_prompt_share)" in line for line in caplog.messages)
    train(config(0))
    assert adapter_sha256(tmp_path / "0.5") != adapter_sha256(tmp_path / "0")


@pytest.mark.slow
def test_the_metrics_of_a_resumed_run_have_each_step_once_and_a_new_learning_rate(tiny_base, photos, tmp_path):
    train(tiny_config(tiny_base, photos, tmp_path), *stop_at(2))
    train(tiny_config(tiny_base, photos, tmp_path, learning_rate=5e-3, resume_from_checkpoint="latest"))
    events = RunDir(tmp_path).read_metrics()
    steps = [(event["step"], event["lr"]) for event in events if event["type"] == "step"]
    assert steps == [(1, 1e-2), (2, 1e-2), (3, 5e-3), (4, 5e-3), (5, 5e-3)]
    assert [event["state"] for event in events if event["type"] == "end"] == ["done"]


@pytest.mark.slow
def test_a_run_without_a_seed_is_resumed_with_the_seed_it_drew(tiny_base, photos, tmp_path):
    def go(*heard, **changes):
        train(tiny_config(tiny_base, photos, tmp_path / "run", **changes), *heard)
        return adapter_sha256(tmp_path / "run")

    go(*stop_at(2), seed=None)
    drawn = RunDir(tmp_path / "run").read_metrics()[0]["config"]["seed"]
    resumed = go(seed=None, resume_from_checkpoint="latest")
    shutil.rmtree(tmp_path / "run")
    assert go(seed=drawn) == resumed


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


@pytest.mark.slow
def test_numbered_checkpoints_are_those_of_diffusers_script_and_the_end_is_called_last(tiny_base, photos, tmp_path):
    """Multiples of `--checkpointing_steps`, the newest `--checkpoints_total_limit` of them."""
    run = RunDir(tmp_path / "run")

    def go(steps, *heard, **changes):
        every = {"checkpointing_steps": 2, "checkpoints_total_limit": 2, "max_train_steps": steps}
        train(tiny_config(tiny_base, photos, run.path, **every | changes), *heard)
        return [path.name for path in run.checkpoints()]

    assert go(7, *stop_at(3)) == ["checkpoint-2", "last"]
    assert go(7, resume_from_checkpoint="latest") == ["checkpoint-4", "checkpoint-6", "last"]
    seven = adapter_sha256(run.path)
    assert go(8, resume_from_checkpoint="latest") == ["checkpoint-6", "checkpoint-8"]
    assert [e["step"] for e in run.read_metrics() if e["type"] == "step"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert go(7, resume_from_checkpoint="checkpoint-6") == ["checkpoint-6", "last"]
    assert adapter_sha256(run.path) == seven
    go(7, resume_from_checkpoint="checkpoint-6")
    assert (run.path / "earlier_run_2" / "last" / "position.json").is_file()


def test_latest_passes_by_a_damaged_last(tiny_base, photos, tmp_path):
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
