"""Going on with other settings, or from a damaged checkpoint: one line that names it, and nothing touched."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dreambooth_moslora.adapters.raw_file import read_tensors, write_file
from dreambooth_moslora.cli.parser import parse_train_config
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import RAW_NAME, RunDir
from dreambooth_moslora.training.checkpoint import (
    Position,
    check_resumed,
    check_whole,
    find_checkpoint,
    load_states,
)
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory):
    """(run folder, its configuration with changes)."""
    folder = tmp_path_factory.mktemp("finished")
    photos = paint_photos(folder / "photos")

    def config(**changes):
        return tiny_config(
            tiny_base, photos, folder / "run", **{"max_train_steps": 1, "checkpointing_steps": 1} | changes
        )

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
        check_resumed(config(**{name: value}), checkpoint, check_whole(checkpoint))


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
        check_resumed(config(**same), checkpoint, check_whole(checkpoint))


def test_the_settings_file_of_an_earlier_version_goes_on_where_removed_settings_are_off(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    file = RunDir(tmp_path / "run").config_path
    old = {"new_backgrounds": 0, "background_scenes": [], "output_dir": str(tmp_path / "run")}
    file.write_text(json.dumps(json.loads(file.read_text()) | old))
    flags = ["--resume_from_checkpoint", "latest", "--max_train_steps", "2"]
    assert train(parse_train_config(["--config", str(file), *flags])).step == 2
    assert not {"new_backgrounds", "background_scenes"} & json.loads(file.read_text()).keys()


def test_a_checkpoint_that_was_trained_with_a_removed_setting_goes_on_and_says_so(finished, tmp_path, caplog):
    folder, config = finished
    checkpoint = shutil.copytree(RunDir(folder).latest_checkpoint(), tmp_path / "checkpoint-1")
    position = check_whole(checkpoint)
    tensors, header = read_tensors(checkpoint / RAW_NAME)
    facts = json.loads(header["moslora"])
    facts["recipe"]["new_backgrounds"] = 3
    write_file(checkpoint / RAW_NAME, tensors, {**header, "moslora": json.dumps(facts)})
    check_resumed(config(), checkpoint, position)
    (said,) = caplog.messages
    assert said.startswith("checkpoint-1 was trained with --new_backgrounds, removed, as ")


@pytest.mark.parametrize(
    ("change", "kind"), [({"optimizer": "Prodigy"}, "Prodigy"), ({"use_8bit_adam": True}, "AdamW8bit")]
)
def test_another_optimizer_is_refused_by_name_and_an_early_position_file_goes_on(change, kind, finished):
    folder, config = finished
    checkpoint = RunDir(folder).latest_checkpoint()
    position = check_whole(checkpoint)
    with pytest.raises(UserError, match=f"checkpoint-1 was written with AdamW; you ask for {kind}"):
        check_resumed(config(**change), checkpoint, position)
    check_resumed(config(), checkpoint, Position(position.step, position.seed))


DAMAGE = {
    "position.json": (
        b'{"step": "one", "seed": 3}',
        b"[1]",
        b'{"step": 1',
        b'{"step": true, "seed": 3}',
        b"{}",
        b"[" * 100_000,
    ),
    "optimizer.pt": (b"PK", b"no archive", None),
    "moslora_weights.safetensors": (b"short", None),
}


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, kinds in DAMAGE.items() for i in range(len(kinds))])
def test_a_damaged_checkpoint_is_named_in_one_line(name, number, finished, tmp_path):
    folder, config = finished
    checkpoint = Path(shutil.copytree(RunDir(folder).latest_checkpoint(), tmp_path / "checkpoint-1"))
    position, content = check_whole(checkpoint), DAMAGE[name][number]
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:-200] if content is None else content)
    with pytest.raises(UserError, match=f"checkpoint-1 is damaged .{name}") as found:
        if name == "position.json":
            check_whole(checkpoint)
        check_resumed(config(), checkpoint, position)
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


@pytest.fixture
def run(finished, tmp_path):
    """A run with two checkpoints, to be damaged, and its configuration."""
    own = replace(finished[1](), output_dir=str(tmp_path / "run"), max_train_steps=4, checkpointing_steps=2)
    train(own)
    return RunDir(tmp_path / "run"), own


def exp_avg(states, value):
    states["state"][0]["exp_avg"] = value(states["state"][0]["exp_avg"])


def going_on(checkpoint):
    return {"resume_from_checkpoint": str(checkpoint), "max_train_steps": 2}


STATES = {
    "a moment of another shape": (lambda s: exp_avg(s, lambda m: torch.ones(3)), "exp_avg is"),
    "a moment of another type": (lambda s: exp_avg(s, lambda m: m.half()), "exp_avg is no tensor"),
    "a moment that is NaN": (lambda s: exp_avg(s, lambda m: m * float("nan")), "exp_avg is not finite"),
    "no moment": (lambda s: s["state"][0].pop("exp_avg"), "states are"),
    "too many steps": (lambda s: s["state"][0].update(step=torch.tensor(1e9)), "it has taken"),
    "steps as a vector": (lambda s: s["state"][0].update(step=torch.ones(4)), "it has taken"),
    "another parameter": (lambda s: s["state"].update({999: s["state"][0]}), "no parameter 999"),
    "a group less": (lambda s: s["param_groups"].pop(), "groups"),
}


@pytest.mark.parametrize("name", STATES)
def test_states_that_are_not_the_optimizers_are_refused_before_they_are_used(name, finished, tmp_path):
    """A file without a digest is of an early version: its states are checked all the same."""
    folder, config = finished
    change, says = STATES[name]
    checkpoint = Path(shutil.copytree(RunDir(folder).latest_checkpoint(), tmp_path / "checkpoint-1"))
    states = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    change(states)
    torch.save(states, checkpoint / "optimizer.pt")
    position = json.loads((checkpoint / "position.json").read_text())
    (checkpoint / "position.json").write_text(json.dumps({**position, "digest": None}))
    with pytest.raises(UserError, match=f"checkpoint-1 is damaged .optimizer.pt: .*{says}"):
        train(replace(config(), output_dir=str(tmp_path / "run"), **going_on(checkpoint)))


def test_settings_in_the_states_give_way_to_those_of_the_command_line(finished, tmp_path):
    folder, config = finished
    hashes = []
    for name, change in (("as it was", {}), ("changed", {"maximize": True, "eps": "large", "betas": (0.0, 0.0)})):
        checkpoint = Path(shutil.copytree(RunDir(folder).latest_checkpoint(), tmp_path / name / "checkpoint-1"))
        states = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        states["param_groups"][0] |= change
        torch.save(states, checkpoint / "optimizer.pt")
        (checkpoint / "position.json").write_text('{"step": 1, "seed": 3}')
        output = tmp_path / f"{name} run"
        train(replace(config(), output_dir=str(output), **going_on(checkpoint)))
        hashes.append(adapter_sha256(output))
    assert hashes[0] == hashes[1]


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_step(run, step):
    path = run.checkpoint_path(4) / "position.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": step}))


DAMAGES = {
    "a bit of the optimizer": lambda run: flipped(run.checkpoint_path(4) / "optimizer.pt"),
    "a bit of the adapter": lambda run: flipped(run.checkpoint_path(4) / "moslora_weights.safetensors"),
    "another checkpoint's optimizer": lambda run: shutil.copy(
        run.checkpoint_path(2) / "optimizer.pt", run.checkpoint_path(4)
    ),
    "another checkpoint's position": lambda run: shutil.copy(
        run.checkpoint_path(2) / "position.json", run.checkpoint_path(4)
    ),
    "a step far away": lambda run: change_step(run, 10**9),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_latest_passes_by_a_checkpoint_that_was_changed_and_says_so(name, run, caplog):
    run_dir, _ = run
    DAMAGES[name](run_dir)
    assert find_checkpoint(run_dir, "latest") == run_dir.checkpoint_path(2)
    assert "latest skips checkpoint-4" in caplog.text
    with pytest.raises(UserError, match="checkpoint-4 is damaged"):
        check_whole(run_dir.checkpoint_path(4))


def test_a_run_goes_on_from_the_newest_whole_checkpoint_to_the_same_adapter(run):
    run_dir, config = run
    before = adapter_sha256(run_dir.path)
    flipped(run_dir.checkpoint_path(4) / "optimizer.pt")
    assert train(replace(config, resume_from_checkpoint="latest")).step == 4
    assert adapter_sha256(run_dir.path) == before
