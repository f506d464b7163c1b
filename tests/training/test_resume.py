"""Stop and resume: the published files are those of a run that was never interrupted, byte for
byte; what a checkpoint holds, from which one a run goes on, and what becomes of an earlier run in
the folder. `KINDS` is the matrix: a feature whose state a checkpoint has to keep is a row of it."""

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.contents import hash_file, hash_values
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.lora import raw_file
from dreambooth_moslora.method import moslora
from dreambooth_moslora.settings.optimizers import OPTIMIZERS
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training import checkpoint as checkpoints
from dreambooth_moslora.training import dry_run, loop
from dreambooth_moslora.training.checkpoint import (
    Position,
    check_resumed_settings,
    find_checkpoint,
    verify_checkpoint,
)
from dreambooth_moslora.training.loop import train
from tests.helpers.changed_base import change_token, flip_last_bit, swap_ids
from tests.helpers.folding import load_published
from tests.helpers.tiny import tiny_unet
from tests.helpers.tiny_training import adapter_sha256, logged, paint_photos, tiny_config
from tests.training.conftest import flipped, stop_at

pytestmark = pytest.mark.usefixtures("few_steps")

DOG = {
    "instance_data_dir": "photos",
    "instance_prompt": "a photo of sks dog",
    "class_prompt": "a photo of a dog",
}
CAT = {
    "instance_data_dir": "cat",
    "instance_prompt": "a photo of zwx cat",
    "class_prompt": "a photo of a cat",
}
CLASS_IMAGES = {"with_prior_preservation": True}
BASE_PRIOR = {"with_prior_preservation": True, "prior": "adapter_off"}
WARM, TWO_CROPS = {"lr_warmup_steps": 2}, {"crops_per_photo": 2}
TAGS = {
    "instance_prompt": "sks dog, red, round, on grass",
    "shuffle_caption": True,
    "keep_tokens": 1,
}
BUCKETS = {
    "enable_bucket": True,
    "bucket_reso_steps": 16,
    "train_batch_size": 2,
    "caching": "disk",
    **TWO_CROPS,
}
SIZES = {"num_class_images": 5, "sample_batch_size": 1}
CONVOLUTIONS = {"target_modules": ("to_q", "conv1", "conv_shortcut")}
TEXT = {"train_text_encoder": True, "lora_dropout": 0.3, "use_dora": True, "lr_scheduler": "cosine"}
BITS_8 = {
    "use_8bit_adam": True,
    "rank": 128,
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
    "base_quantization": "int8",
}
ACCUMULATED = {"gradient_accumulation_steps": 3, "train_batch_size": 2}
PRODIGY, ADAFACTOR = (
    {"optimizer": "Prodigy", "learning_rate": 1.0},
    CONVOLUTIONS | {"optimizer": "Adafactor"},
)
KINDS = {
    "bare_prompt": {
        "instance_data_dir": "placed",
        "instance_prompt_share": 0.5,
        "seed": 1,
        "random_flip": True,
    },
    "class_images_and_captions": CLASS_IMAGES | TAGS | {"caption_dropout": 0.4},
    "text_encoder_dropout_and_dora": BASE_PRIOR | WARM | TEXT,
    "buckets_class_images_of_several_sizes_and_adafactor": BUCKETS
    | SIZES
    | CLASS_IMAGES
    | ADAFACTOR,
    "prodigy_uncached": TWO_CROPS | PRODIGY | {"caching": "off"},
    "schedule_free": WARM
    | {"optimizer": "AdamWScheduleFree", "lr_scheduler": "constant_with_warmup"},
    "accumulation_convolutions_and_all_in_8_bit": ACCUMULATED | CONVOLUTIONS | BITS_8,
    "several_subjects": CLASS_IMAGES | {"subjects": [DOG, CAT]},
}
NEEDS = {"schedule_free": [pytest.mark.extra("schedulefree")]}
FAST = ("bare_prompt",)
STOPS = {
    "class_images_and_captions": (1, 2, 3),
    # step 2 has the whole learning rate
    **dict.fromkeys(("text_encoder_dropout_and_dora", "schedule_free"), (1,)),
    "buckets_class_images_of_several_sizes_and_adafactor": (0, 2),
}
"""After which steps a run is stopped, if not after the second alone. Step 0: while class images are
drawn."""


def test_a_run_is_stopped_with_every_optimizer():
    stopped = {kind.get("optimizer", "AdamW") for kind in KINDS.values()}
    assert stopped == OPTIMIZERS.keys()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Beside it are `cat` with one photo, and `placed` with captions that name a place."""
    folder = tmp_path_factory.mktemp("photos")
    paint_photos(folder / "cat", 1)
    for path in paint_photos(folder / "placed").iterdir():
        path.with_suffix(".txt").write_text("a photo of sks dog on grass")
    return paint_photos(folder / "photos")


def read_results(folder: Path) -> dict[str, bytes]:
    """The published files, the last checkpoint's adapter and the class images, whole."""
    paths = [*folder.glob("*.safetensors"), *folder.glob("last/*.safetensors")]
    paths += RunDir(folder).class_images_dir.rglob("*.*")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    "kind",
    [
        k if k in FAST else pytest.param(k, marks=[pytest.mark.slow, *NEEDS.get(k, [])])
        for k in KINDS
    ],
)
def test_interrupted_and_resumed_equals_unbroken(kind, tiny_base, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos.parent)
    config = tiny_config(
        tiny_base, photos, tmp_path / "run", **{"max_train_steps": 4, **KINDS[kind]}
    )
    again, run = replace(config, resume_from_checkpoint="latest"), RunDir(tmp_path / "run")
    train(config)
    unbroken = read_results(run.path)
    shutil.rmtree(run.path)
    for step in STOPS.get(kind, (2,)):
        heard = (
            stop_at(step)
            if step
            else (None, lambda: len([*run.class_images_dir.glob("*.png")]) > 1)
        )
        result = train(again, *heard)
        assert result.interrupted and result.step == step
        results = read_results(run.path)
        assert results != unbroken and results.keys() <= unbroken.keys()
        assert not step or run.find_latest_checkpoint().name == "last"
    result = train(again)
    assert not result.interrupted and result.step == config.max_train_steps
    assert read_results(run.path) == unbroken


@pytest.mark.slow
def test_two_resumed_processes_equal_unbroken_ones(tiny_base, photos, tmp_path, play):
    """The second hears the signal in its second step."""
    settings = {"max_train_steps": 4, **KINDS["class_images_and_captions"]}
    whole, torn = (
        tiny_config(tiny_base, photos, tmp_path / name / "run", **settings)
        for name in ("whole", "torn")
    )
    stopped = {"config": torn, "place": "averaged", "rank": 1, "after": 1, "end": "stop"}
    scenes = [
        {"config": whole},
        stopped,
        {"config": replace(torn, resume_from_checkpoint="latest")},
    ]
    ended, played_scenes = play(scenes)
    for played in played_scenes:
        assert [scene["code"] for scene in played] == [0, 130, 0], ended
        assert [scene["averaged"] for scene in played[1:]] == [[0, 1], [2, 3]]
    assert read_results(tmp_path / "torn" / "run") == read_results(tmp_path / "whole" / "run") != {}


@pytest.mark.slow
def test_resume_logs_each_step_once_with_new_rate_and_old_seed(tiny_base, photos, tmp_path):
    rate = {"learning_rate": 5e-3, "resume_from_checkpoint": "latest"}
    train(tiny_config(tiny_base, photos, tmp_path / "run", seed=None), *stop_at(2))
    seed = RunDir(tmp_path / "run").read_events()[0]["config"]["seed"]
    train(tiny_config(tiny_base, photos, tmp_path / "run", seed=None, **rate))
    rates = [(event["step"], event["lr"]) for event in logged(tmp_path / "run")]
    assert rates == [*((step, 1e-2) for step in (1, 2)), *((step, 5e-3) for step in (3, 4, 5))]
    assert [event["state"] for event in logged(tmp_path / "run", "end")] == ["done"]
    train(tiny_config(tiny_base, photos, tmp_path / "again", seed=seed), *stop_at(2))
    train(tiny_config(tiny_base, photos, tmp_path / "again", seed=seed, **rate))
    assert adapter_sha256(tmp_path / "again") == adapter_sha256(tmp_path / "run")


def test_latest_without_a_checkpoint_begins_anew_and_says_so(tiny_base, photos, tmp_path, caplog):
    """A dry run says it too."""
    config = tiny_config(tiny_base, photos, tmp_path, resume_from_checkpoint="latest")
    (tmp_path / "checkpoint-4").mkdir()
    dry_run.describe_run(config)
    assert f"latest: no complete checkpoint in {tmp_path}; starting at step 0" in caplog.text
    (tmp_path / "checkpoint-4").rmdir()
    caplog.clear()
    assert train(config).step == 5
    assert f"latest: no complete checkpoint in {tmp_path}; starting at step 0" in caplog.text
    assert train(config).step == 5 and caplog.text.count("starting at step 0") == 1


@pytest.mark.slow
def test_checkpoint_names_equal_those_of_diffusers_script(tiny_base, photos, tmp_path):
    """Multiples of `--checkpointing_steps`, the newest `--checkpoints_total_limit` of them."""
    run = RunDir(tmp_path / "run")

    def go(steps, *heard, **changes):
        every = {"checkpointing_steps": 2, "checkpoints_total_limit": 2, "max_train_steps": steps}
        train(tiny_config(tiny_base, photos, run.path, **every | changes), *heard)
        return [path.name for path in run.list_checkpoints()]

    assert go(7, *stop_at(3)) == ["checkpoint-2", "last"]
    assert go(7, resume_from_checkpoint="latest") == ["checkpoint-4", "checkpoint-6", "last"]
    seven = adapter_sha256(run.path)
    assert go(8, resume_from_checkpoint="latest") == ["checkpoint-6", "checkpoint-8"]
    assert [event["step"] for event in logged(run.path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert go(7, resume_from_checkpoint="checkpoint-6") == ["checkpoint-6", "last"]
    assert [path.name for path in (run.path / "earlier_run_1").glob("checkpoint-*")] == [
        "checkpoint-8"
    ]
    assert adapter_sha256(run.path) == seven
    go(7, resume_from_checkpoint="checkpoint-6")
    assert (run.path / "earlier_run_2" / "last" / "position.json").is_file()


def test_a_later_best_goes_aside(tiny_base, photos, tmp_path, monkeypatch):
    """An earlier one stays. A run in a fresh folder can be watched while it is prepared."""
    events_seen, prepare, run = [], loop.prepare_inputs, RunDir(tmp_path / "run")

    def prepare_seen(*arguments, **options):
        events_seen.extend(run.read_events())
        return prepare(*arguments, **options)

    monkeypatch.setattr(loop, "prepare_inputs", prepare_seen)
    train(tiny_config(tiny_base, photos, run.path, max_train_steps=3, checkpointing_steps=2))
    assert [event["type"] for event in events_seen] == ["start"]
    run.best_dir.mkdir()
    run.record_event(
        {"type": "evaluation", "step": 4, "best": {"step": 3, "score": 1.0, "since": 1}}
    )
    checkpoints.move_later_checkpoints(run, 3)
    assert run.best_dir.is_dir()
    checkpoints.move_later_checkpoints(run, 2)
    assert not run.best_dir.exists() and (run.path / "earlier_run_1" / "best").is_dir()


@pytest.fixture(scope="module")
def finished(tiny_base, photos, tmp_path_factory):
    """(run folder, its configuration with changes)."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = lambda **changes: tiny_config(  # noqa: E731
        tiny_base, photos, folder, **{"max_train_steps": 2} | changes
    )
    train(config(checkpointing_steps=1))
    return folder, config


def test_exported_checkpoint_tells_its_step(finished, tmp_path):
    """The exported file said that it was the whole run's."""
    for step, expected_step in ((1, 1), (2, None)):
        source, out = RunDir(finished[0]).get_checkpoint_path(step), tmp_path / str(step)
        assert main(["export", str(source), "--out", str(out)]) == 0
        assert load_published(out)[1].step == expected_step


@pytest.fixture
def checkpoint(finished, tmp_path):
    """A copy of its first checkpoint."""
    return Path(
        shutil.copytree(RunDir(finished[0]).get_checkpoint_path(1), tmp_path / "checkpoint-1")
    )


CHANGES = {
    "rank": (16, "has 4; you ask for 16"),
    "lora_alpha": (8.0, "has 4; you ask for 8"),
    "mixer": ("identity", "has orthogonal; you ask for identity"),
    "train_mixer": (False, "has True; you ask for False"),
    "lora_dropout": (0.5, "has 0; you ask for 0.5"),
    "seed": (4, "has 3; you ask for 4"),
}
OFF = ("use_rslora", "use_dora", "train_text_encoder")
CHANGES |= dict.fromkeys(OFF, (True, "has False; you ask for True"))


@pytest.mark.parametrize("name", CHANGES)
def test_fixed_setting_that_differs_on_resume_is_refused(name, finished, checkpoint):
    value, says = CHANGES[name]
    with pytest.raises(UserError, match=f"--{name}: checkpoint-1 {says}: resume without it"):
        check_resumed_settings(
            finished[1](**{name: value}), checkpoint, verify_checkpoint(checkpoint)
        )


def test_the_same_settings_and_an_unnamed_seed_go_on(finished, checkpoint):
    """Another optimizer is refused by name."""
    position = verify_checkpoint(checkpoint)
    same = {
        "seed": None,
        "lora_alpha": 4.0,
        "learning_rate": 1.0,
        "target_modules": ("to_q", "attn1.to_q"),
    }
    for changes in ({}, *({name: value} for name, value in same.items())):
        check_resumed_settings(finished[1](**changes), checkpoint, position)
    for change, kind in (
        ({"optimizer": "Prodigy"}, "Prodigy"),
        ({"use_8bit_adam": True}, "AdamW8bit"),
    ):
        with pytest.raises(
            UserError, match=f"checkpoint-1 was written with AdamW; you ask for {kind}"
        ):
            check_resumed_settings(finished[1](**change), checkpoint, position)


CHANGED = {
    "learning_rate": (1e-4, 2e-4, "learning_rate: 1e-4 -> 2e-4"),
    "adam_weight_decay": (0.01, 0.1, "adam_weight_decay: 0.01 -> 0.1"),
    "instance_prompt": ("sks dog", "sks pup", "instance_prompt: sks dog -> sks pup"),
    "train_batch_size": (1, 2, "train_batch_size: 1 -> 2"),
    "resolution": (64, 72, "resolution: 64 -> 72"),
    "snr_gamma": (None, 5.0, "snr_gamma: not set -> 5"),
    "noise_offset": (0.0, 0.05, "noise_offset: 0 -> 0.05"),
    "random_flip": (False, True, "random_flip: False -> True"),
    "gradient_accumulation_steps": (1, 2, "gradient_accumulation_steps: 1 -> 2"),
    "crops_per_photo": (1, 2, "crops_per_photo: 1 -> 2"),
    "prior": ("class_images", "adapter_off", "prior: class_images -> adapter_off"),
    "max_grad_norm": (1.0, 0.5, "max_grad_norm: 1 -> 0.5"),
    "mixed_precision": (None, "bf16", "mixed_precision: no -> bf16"),
    "target_modules": (
        ("to_q",),
        ("attn1.to_q", "to_q"),
        "target_modules: to_q -> attn1.to_q, to_q",
    ),
    "leave_out": ((), ("2.png",), "leave_out: not set -> 2.png"),
    "instance_data_dir": ("photos", "others", "instance_data_dir: photos -> others"),
}


def list_changes_logged(records) -> list[str]:
    """What a run said of its checkpoint, without the checkpoint's name."""
    end = " (since checkpoint-1)"
    lines = [record.getMessage() for record in records]
    return [line.removesuffix(end) for line in lines if line.endswith(end)]


def test_resume_logs_changed_settings_and_photos(tmp_path, monkeypatch, caplog):
    """On the embedded base; a dry run says the same."""
    monkeypatch.chdir(tmp_path)
    paint_photos(tmp_path / "photos", 4)
    (tmp_path / "photos" / "3.txt").write_text("sks dog on grass")
    begun = {name: before for name, (before, _, _) in CHANGED.items()}
    run = tmp_path / "run"
    config = partial(tiny_config, "toy", tmp_path / "photos", run, max_train_steps=1, memory="auto")
    train(config(**begun, checkpointing_steps=1))
    again = {"checkpointing_steps": 1, "resume_from_checkpoint": "latest"}

    train(config(**begun, **again))
    dry_run.describe_run(config(**begun, **again))
    assert list_changes_logged(caplog.records) == []

    # A photo goes, one comes, one gets another content, a caption is rewritten.
    other_photos = Path(shutil.copytree(tmp_path / "photos", tmp_path / "others"))
    (other_photos / "0.png").rename(other_photos / "4.png")
    shutil.copy(other_photos / "4.png", other_photos / "1.png")
    (other_photos / "3.txt").write_text("sks dog at home")
    of_photos = ["0.png: removed", "1.png: replaced", "3.txt: replaced", "4.png: added"]
    changed = {name: after for name, (_, after, _) in CHANGED.items()}
    expected = sorted([line for *_, line in CHANGED.values()] + of_photos)
    report = dry_run.describe_run(config(**changed, **again))
    block = next(block for block in report.split("\n\n") if block.startswith("changed since"))
    assert sorted(block.split("\n  ")[1:]) == expected
    train(config(**changed, **again))
    assert sorted(list_changes_logged(caplog.records)) == expected
    assert all(
        record.levelname == "WARNING" for record in caplog.records if list_changes_logged([record])
    )


def test_checkpoint_records_settings_and_old_ones_resume(finished, checkpoint, monkeypatch):
    """Its folder's last run may have had other settings. Many photos are counted."""
    position = verify_checkpoint(checkpoint)
    config = finished[1](checkpointing_steps=1, seed=None)
    photos = position.photos
    assert checkpoints.list_changes(position, config, photos) == []
    many = {f"{number}.png": "" for number in range(1, 30)}
    changes = checkpoints.list_changes(position, config, many)
    assert changes == ["photos and the files beside them: 27 added, 1 removed, 2 replaced"]
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert checkpoints.list_changes(position, config, photos) == ["processes: 1 -> 2"]

    # The first versions wrote neither settings nor photos.
    earlier = replace(position, settings={}, photos={}, digest="")
    files = {path.name: hash_file(path) for path in checkpoint.iterdir()}
    del files["position.json"]
    facts = {name: getattr(position, name) for name in ("step", "seed", "optimizer", "base")}
    facts["digest"] = hash_values(**facts, digest="", files=files)
    (checkpoint / "position.json").write_text(json.dumps(facts))
    position_read = verify_checkpoint(checkpoint)
    assert replace(position_read, digest="") == earlier
    assert checkpoints.list_changes(position_read, finished[1](learning_rate=1.0), photos) == []


def flip_unet(base: Path) -> None:
    flip_last_bit(base / "unet" / "diffusion_pytorch_model.safetensors")


def flip_vae(base: Path) -> None:
    flip_last_bit(base / "vae" / "diffusion_pytorch_model.safetensors")


def add_half(base: Path) -> None:
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(tensors, file.with_suffix(".fp16.safetensors"), {"format": "pt"})


def copy_only(base: Path) -> None:
    """Nothing changes."""


@pytest.fixture
def goes_on(finished, checkpoint):
    """Goes on from its first checkpoint, in a folder of its own."""

    def go_on(**changes):
        place = {
            "resume_from_checkpoint": str(checkpoint),
            "output_dir": str(checkpoint.with_name("goes_on")),
        }
        train(finished[1](**place, **changes))

    return go_on


OTHERS = {
    "the last number of the UNet": (flip_unet, {}, None),
    "that, in another precision": (flip_unet, {"mixed_precision": "bf16"}, None),
    "that, quantized": (flip_unet, {"base_quantization": "int8"}, None),
    "another variant of its files": (add_half, {"variant": "fp16"}, []),
    "a token's embedding": (change_token, {}, ["text_encoder: replaced"]),
    "two letters of a tokenizer": (swap_ids, {}, ["text_encoder_2: replaced"]),
    "the last number of the VAE": (flip_vae, {}, ["vae: replaced"]),
    "the same, in another precision": (copy_only, {"mixed_precision": "bf16"}, []),
    "the same, quantized": (copy_only, {"base_quantization": "int8"}, []),
}
"""How a base differs from the checkpoint's, with which settings, and the lines that say it; None
where it is refused."""


@pytest.mark.parametrize("name", OTHERS)
def test_other_denoiser_is_refused_and_other_encoders_logged(
    name, tiny_base, checkpoint, prepare_base, tmp_path
):
    change, settings, lines = OTHERS[name]
    base = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    change(base)
    digests = prepare_base(base, **settings).base_identity
    position = verify_checkpoint(checkpoint)
    compare = partial(checkpoints.compare_bases, TrainConfig(**settings), checkpoint)
    if lines is not None:
        assert compare(position, digests) == lines
        return
    with pytest.raises(UserError, match="checkpoint-1 was trained on a base with other weights"):
        compare(position, digests)

    # The first versions told no digests, and their checkpoints go on as they did.
    identity = "torch.float32 none None 0f6ad33c"
    assert compare(replace(position, base=identity), digests) == []


def test_resume_logs_replaced_parts_of_the_base(tiny_base, goes_on, tmp_path, caplog):
    base = Path(shutil.copytree(tiny_base, tmp_path / tiny_base.name))
    change_token(base)
    flip_vae(base)
    goes_on(pretrained_model_name_or_path=str(base))
    replaced = ["text_encoder: replaced", "vae: replaced"]
    lines = list_changes_logged(caplog.records)
    assert [line for line in lines if line.endswith(": replaced")] == replaced


TEXTS = (
    '{"step": "one", "seed": 3}',
    "[1]",
    '{"step": 1',
    '{"step": true, "seed": 3}',
    "{}",
    "[" * 100_000,
)
DAMAGE = {
    "position.json": tuple(map(str.encode, TEXTS)),
    "optimizer.pt": (b"PK", b"no archive", None),
    "moslora_weights.safetensors": (b"short", None),
}


@pytest.mark.parametrize(
    ("name", "number"), [(name, i) for name, kinds in DAMAGE.items() for i in range(len(kinds))]
)
def test_a_damaged_checkpoint_is_named_in_one_line(name, number, finished, checkpoint):
    position, content = verify_checkpoint(checkpoint), DAMAGE[name][number]
    (checkpoint / name).write_bytes(
        (checkpoint / name).read_bytes()[:-200] if content is None else content
    )
    with pytest.raises(UserError, match=f"checkpoint-1 is damaged .{name}") as error:
        if name == "position.json":
            verify_checkpoint(checkpoint)
        check_resumed_settings(finished[1](), checkpoint, position)
        checkpoints.load_states(checkpoint, "optimizer.pt")
    assert "\n" not in str(error.value)


def test_incomplete_checkpoint_is_never_resumed(checkpoint, tmp_path):
    run = RunDir(tmp_path)
    for missing in DAMAGE:
        shutil.copytree(checkpoint, run.get_checkpoint_path(2), dirs_exist_ok=True)
        (run.get_checkpoint_path(2) / missing).unlink()
        assert find_checkpoint(run, "latest") == run.get_checkpoint_path(1)
        with pytest.raises(UserError, match="checkpoint-2: no complete checkpoint"):
            find_checkpoint(run, "checkpoint-2")


@pytest.mark.slow
def test_latest_skips_a_damaged_checkpoint(finished, tmp_path, caplog):
    config = finished[1](output_dir=str(tmp_path / "run"), max_train_steps=4, checkpointing_steps=2)
    train(config)
    run = RunDir(tmp_path / "run")
    older, newest, before = (
        run.get_checkpoint_path(2),
        run.get_checkpoint_path(4),
        adapter_sha256(run.path),
    )
    whole = {path: path.read_bytes() for path in newest.iterdir()}
    position = json.loads((newest / "position.json").read_text())
    far, bare = (json.dumps(position | odd).encode() for odd in ({"step": 10**9}, {"digest": ""}))
    files = {
        name: (newest / name).read_bytes()
        for name in ("moslora_weights.safetensors", "optimizer.pt")
    }
    damages = [(name, flipped(content, len(content) // 2)) for name, content in files.items()]
    damages += [(name, (older / name).read_bytes()) for name in ("optimizer.pt", "position.json")]
    for name, damage in (*damages, ("position.json", far), ("position.json", bare)):
        for path, content in whole.items():
            path.write_bytes(content)
        (newest / name).write_bytes(damage)
        assert find_checkpoint(run, "latest") == older
        with pytest.raises(UserError, match="checkpoint-4 is damaged"):
            verify_checkpoint(newest)
    assert caplog.text.count("latest skips checkpoint-4") == 6
    assert train(replace(config, resume_from_checkpoint="latest")).step == 4
    assert adapter_sha256(run.path) == before


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


MISTAKES = {
    "rank": {"rank": 7, "resume_from_checkpoint": "latest"},
    "targets": {"target_modules": ("missing",)},
}
MISTAKES |= {
    name: {name: "missing"} for name in ("instance_data_dir", "pretrained_model_name_or_path")
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_touches_no_finished_run(name, finished):
    folder, config = finished
    before, events = contents(folder), []
    with pytest.raises((UserError, ValueError)):
        train(config(**MISTAKES[name]), events.append)
    assert contents(folder) == before
    # the others have no plan
    assert [event.state for event in events[-1:]] == (["failed"] if name == "rank" else [])


def test_stop_before_the_first_step_changes_no_files(
    finished,
):
    folder, config = finished
    before = contents(folder)
    assert train(config(), should_stop=lambda: True).step == 0 and contents(folder) == before
    result = train(config(resume_from_checkpoint="checkpoint-1"), should_stop=lambda: True)
    assert result.interrupted and result.step == 1
    after = contents(folder)
    assert {str(path) for path in after if after[path] != before[path]} == {"metrics.jsonl"}
    end = RunDir(folder).read_events()[-1]
    assert (end["type"], end["state"], end["step"]) == ("end", "interrupted", 1)


@pytest.mark.parametrize("source", [None, "checkpoint-1"])
def test_what_another_program_left_under_our_names_is_set_aside(source, finished, tmp_path):
    """What diffusers' script leaves, where a run begins, and where it goes on from elsewhere."""
    run, (folder, config) = tmp_path / "run", finished
    (run / "checkpoint-2").mkdir(parents=True)
    for name in ("checkpoint-2/optimizer.bin", f"checkpoint-2/{PUBLISHED_NAME}", PUBLISHED_NAME):
        (run / name).write_bytes(name.encode())
    if source is None:
        (run / PUBLISHED_NAME).unlink()
    theirs = contents(run)
    train(
        config(
            output_dir=str(run),
            checkpointing_steps=2,
            resume_from_checkpoint=source and str(folder / source),
        )
    )
    assert contents(run / "earlier_run_1") == theirs
    assert (run / PUBLISHED_NAME).read_bytes() == (folder / PUBLISHED_NAME).read_bytes()
    assert (run / "checkpoint-2" / "position.json").is_file()


def test_earlier_run_is_moved_aside_with_its_scores(finished, tmp_path):
    folder, config = finished
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    judged = "evaluation", "mixers_evaluation"
    for name in judged:
        (moved / name).mkdir()
    train(config(output_dir=moved, max_train_steps=3))
    assert [path.name for path in moved.glob("*.kohya.safetensors")] == ["moved.kohya.safetensors"]
    home = max(moved.glob("earlier_run_*"))
    aside = {path.name for path in home.iterdir()}
    assert {"run.kohya.safetensors", *judged} <= aside
    assert not [*moved.glob("*evaluation")]
    assert adapter_sha256(home) == adapter_sha256(folder)
    assert [path.name for path in RunDir(moved).list_checkpoints()] == ["last"]


def test_earlier_curves_are_moved_aside_unless_resumed(finished, tmp_path):
    """Tensorboard drew the curves of both as one: it reads all files of a folder."""
    config = partial(finished[1], output_dir=tmp_path / "run", report_to="tensorboard")
    steps = lambda folder: [  # noqa: E731
        scalar.step
        for scalar in EventAccumulator(str(folder / "logs" / "dreambooth_moslora"))
        .Reload()
        .Scalars("loss")
    ]
    for _ in range(2):
        train(config())
    assert steps(tmp_path / "run") == steps(tmp_path / "run" / "earlier_run_1") == [1, 2]
    train(config(max_train_steps=3, resume_from_checkpoint="latest"))
    assert steps(tmp_path / "run") == [1, 2, 3]


def test_a_full_disk_is_told_as_one_and_costs_no_checkpoint(tmp_path):
    """On a disk of 4 MiB, where this user may mount one."""
    command = ["mount", "-t", "tmpfs", "-o", "size=4096k", "none", str(tmp_path)]
    if (
        not sys.platform.startswith("linux")
        or subprocess.run(command, check=False, capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount")
    try:
        unet, run = tiny_unet(), RunDir(tmp_path)
        moslora.inject(unet, moslora.MoSLoraConfig(r=32, target_modules=["to_q"]))
        optimizer = torch.optim.AdamW(
            [p for _, p in moslora.list_adapter_parameters(unet)], lr=1e-3
        )
        parts = ({"unet": unet}, raw_file.build_adapter_metadata({"unet": unet}), optimizer)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        checkpoints.save_checkpoint(run.get_checkpoint_path(1), Position(1, 0), *parts)
        sizes = {path.name: path.stat().st_size for path in run.get_checkpoint_path(1).iterdir()}
        room = sizes["moslora_weights.safetensors"] + sizes["optimizer.pt"] // 2
        (tmp_path / "ballast").write_bytes(bytes(shutil.disk_usage(tmp_path).free - room))
        with pytest.raises(OSError) as error:
            checkpoints.save_checkpoint(run.get_checkpoint_path(2), Position(2, 0), *parts)
        assert error.value.errno == errno.ENOSPC
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ballast", "checkpoint-1"]
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
