"""Going on with other settings, or from a damaged checkpoint: one line that names it, and nothing touched."""

import shutil
from pathlib import Path

import pytest

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.run_folder import RunDir
from dreambooth_moslora.training.checkpoint import Position, check_resumed, find_checkpoint, load_states, read_position
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import paint_photos, tiny_config


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory):
    """(run folder, its configuration with changes)."""
    folder = tmp_path_factory.mktemp("finished")
    photos = paint_photos(folder / "photos")

    def config(**changes):
        return tiny_config(tiny_base, photos, folder / "run", max_train_steps=1, **changes)

    train(config())
    return folder / "run", config


CHANGES = {
    "rank": (16, "has 4; you ask for 16"),
    "lora_alpha": (8.0, "has 4; you ask for 8"),
    "mixer": ("identity", "has orthogonal; you ask for identity"),
    "train_mixer": (False, "has True; you ask for False"),
    "use_rslora": (True, "has False; you ask for True"),
    "use_dora": (True, "has False; you ask for True"),
    "lora_dropout": (0.5, "has 0; you ask for 0.5"),
    "target_modules": (("to_q", "to_out.0"), "has to_q; you ask for to_q to_out.0"),
    "train_text_encoder": (True, "has False; you ask for True"),
    "seed": (4, "has 3; you ask for 4"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_the_checkpoint_has_otherwise_is_refused_with_both_values(name, finished):
    folder, config = finished
    value, says = CHANGES[name]
    checkpoint = RunDir(folder).latest_checkpoint()
    with pytest.raises(UserError, match=f"--{name}: checkpoint-1 {says}: resume without it"):
        check_resumed(config(**{name: value}), checkpoint, read_position(checkpoint))


def test_the_same_settings_and_an_unnamed_seed_go_on(finished):
    folder, config = finished
    checkpoint = RunDir(folder).latest_checkpoint()
    for same in (
        {},
        {"seed": None},
        {"lora_alpha": 4.0},
        {"learning_rate": 1.0},
        {"target_modules": ("to_q", "attn1.to_q")},
    ):
        check_resumed(config(**same), checkpoint, read_position(checkpoint))


@pytest.mark.parametrize(
    ("change", "kind"), [({"optimizer": "Prodigy"}, "Prodigy"), ({"use_8bit_adam": True}, "AdamW8bit")]
)
def test_another_optimizer_is_refused_by_name_and_an_early_position_file_goes_on(change, kind, finished):
    folder, config = finished
    checkpoint = RunDir(folder).latest_checkpoint()
    position = read_position(checkpoint)
    with pytest.raises(UserError, match=f"checkpoint-1 was written with AdamW; you ask for {kind}"):
        check_resumed(config(**change), checkpoint, position)
    check_resumed(config(), checkpoint, Position(position.step, position.seed))


DAMAGE = {
    "position.json": (b'{"step": "one", "seed": 3}', b"[1]", b'{"step": 1', b'{"step": true, "seed": 3}', b"{}"),
    "optimizer.pt": (b"PK", b"no archive", None),
    "moslora_weights.safetensors": (b"short", None),
}


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, kinds in DAMAGE.items() for i in range(len(kinds))])
def test_a_damaged_checkpoint_is_named_in_one_line(name, number, finished, tmp_path):
    folder, config = finished
    checkpoint = Path(shutil.copytree(RunDir(folder).latest_checkpoint(), tmp_path / "checkpoint-1"))
    content = DAMAGE[name][number]
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:-200] if content is None else content)
    with pytest.raises(UserError, match=f"checkpoint-1 is damaged .{name}") as found:
        check_resumed(config(), checkpoint, read_position(checkpoint))
        load_states(checkpoint, "optimizer.pt")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("missing", DAMAGE)
def test_a_checkpoint_with_a_file_missing_is_not_the_latest_and_is_refused_by_name(missing, finished, tmp_path):
    run = RunDir(tmp_path)
    for step in (1, 2):
        shutil.copytree(RunDir(finished[0]).latest_checkpoint(), run.checkpoint_path(step))
    (run.checkpoint_path(2) / missing).unlink()
    assert find_checkpoint(run, "latest") == run.checkpoint_path(1)
    with pytest.raises(UserError, match="checkpoint-2: no complete checkpoint"):
        find_checkpoint(run, "checkpoint-2")


def test_the_trainer_asks(finished):
    with pytest.raises(UserError, match="--rank"):
        train(finished[1](rank=2, resume_from_checkpoint="latest"))
