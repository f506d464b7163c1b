"""What a checkpoint holds, from which one a run goes on, and what becomes of an earlier run in the folder."""

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dreambooth_moslora.adapters.moslora import MoSLoraConfig, adapter_parameters, inject
from dreambooth_moslora.adapters.raw_file import adapter_metadata, read_tensors, write_file
from dreambooth_moslora.cli.train import parse_train_config
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import MIXERS_NAME, PUBLISHED_NAME, RAW_NAME, RunDir
from dreambooth_moslora.training import loop
from dreambooth_moslora.training.checkpoint import (
    Position,
    check_resumed,
    check_whole,
    find_checkpoint,
    load_states,
    save_checkpoint,
)
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny import tiny_unet
from tests.helpers.tiny_training import adapter_sha256, tiny_config


@pytest.fixture(scope="module")
def finished(tiny_base, photos, tmp_path_factory):
    """(run folder, its configuration with changes)."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = lambda **changes: tiny_config(tiny_base, photos, folder, **{"max_train_steps": 2} | changes)  # noqa: E731
    train(config(checkpointing_steps=1))
    return folder, config


@pytest.fixture
def checkpoint(finished, tmp_path):
    """A copy of its first checkpoint."""
    return Path(shutil.copytree(RunDir(finished[0]).checkpoint_path(1), tmp_path / "checkpoint-1"))


CHANGES = {
    "rank": (16, "has 4; you ask for 16"),
    "lora_alpha": (8.0, "has 4; you ask for 8"),
    "mixer": ("identity", "has orthogonal; you ask for identity"),
    "train_mixer": (False, "has True; you ask for False"),
    "use_rslora": (True, "has False; you ask for True"),
    "use_dora": (True, "has False; you ask for True"),
    "use_ema": (True, "has False; you ask for True"),
    "lora_dropout": (0.5, "has 0; you ask for 0.5"),
    "target_modules": (("to_q", "to_out.0"), "has to_q; you ask for to_q to_out.0"),
    "train_text_encoder": (True, "has False; you ask for True"),
    "seed": (4, "has 3; you ask for 4"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_the_checkpoint_has_otherwise_is_refused_with_both_values(name, finished, checkpoint):
    value, says = CHANGES[name]
    with pytest.raises(UserError, match=f"--{name}: checkpoint-1 {says}: resume without it"):
        check_resumed(finished[1](**{name: value}), checkpoint, check_whole(checkpoint))


def test_the_same_settings_and_an_unnamed_seed_go_on(finished, checkpoint):
    same = {"seed": None, "lora_alpha": 4.0, "learning_rate": 1.0, "target_modules": ("to_q", "attn1.to_q")}
    for changes in ({}, *({name: value} for name, value in same.items())):
        check_resumed(finished[1](**changes), checkpoint, check_whole(checkpoint))


def test_the_settings_file_of_an_earlier_version_goes_on_where_removed_settings_are_off(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    file = RunDir(tmp_path / "run").config_path
    old = {"new_backgrounds": 0, "background_scenes": [], "output_dir": str(tmp_path / "run")}
    file.write_text(json.dumps(json.loads(file.read_text()) | old))
    flags = ["--resume_from_checkpoint", "latest", "--max_train_steps", "3"]
    assert train(parse_train_config(["--config", str(file), *flags])).step == 3
    assert not {"new_backgrounds", "background_scenes"} & json.loads(file.read_text()).keys()


def test_a_checkpoint_that_was_trained_with_a_removed_setting_goes_on_and_says_so(finished, checkpoint, caplog):
    position = check_whole(checkpoint)
    tensors, header = read_tensors(checkpoint / RAW_NAME)
    facts = json.loads(header["moslora"])
    facts["recipe"]["new_backgrounds"] = 3
    write_file(checkpoint / RAW_NAME, tensors, {**header, "moslora": json.dumps(facts)})
    check_resumed(finished[1](), checkpoint, position)
    (said,) = caplog.messages
    assert said.startswith("checkpoint-1 was trained with --new_backgrounds, removed, as ")


def test_another_optimizer_is_refused_by_name_and_an_early_position_file_goes_on(finished, checkpoint):
    position = check_whole(checkpoint)
    for change, kind in (({"optimizer": "Prodigy"}, "Prodigy"), ({"use_8bit_adam": True}, "AdamW8bit")):
        with pytest.raises(UserError, match=f"checkpoint-1 was written with AdamW; you ask for {kind}"):
            check_resumed(finished[1](**change), checkpoint, position)
    check_resumed(finished[1](), checkpoint, Position(position.step, position.seed))


TEXTS = '{"step": "one", "seed": 3}', "[1]", '{"step": 1', '{"step": true, "seed": 3}', "{}", "[" * 100_000
DAMAGE = {
    "position.json": tuple(map(str.encode, TEXTS)),
    "optimizer.pt": (b"PK", b"no archive", None),
    "moslora_weights.safetensors": (b"short", None),
}


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, kinds in DAMAGE.items() for i in range(len(kinds))])
def test_a_damaged_checkpoint_is_named_in_one_line(name, number, finished, checkpoint):
    position, content = check_whole(checkpoint), DAMAGE[name][number]
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:-200] if content is None else content)
    with pytest.raises(UserError, match=f"checkpoint-1 is damaged .{name}") as found:
        if name == "position.json":
            check_whole(checkpoint)
        check_resumed(finished[1](), checkpoint, position)
        load_states(checkpoint, "optimizer.pt")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("missing", DAMAGE)
def test_a_checkpoint_with_a_file_missing_is_not_the_latest_and_is_refused_by_name(missing, checkpoint, tmp_path):
    run = RunDir(tmp_path)
    shutil.copytree(checkpoint, run.checkpoint_path(2))
    (run.checkpoint_path(2) / missing).unlink()
    assert find_checkpoint(run, "latest") == run.checkpoint_path(1)
    with pytest.raises(UserError, match="checkpoint-2: no complete checkpoint"):
        find_checkpoint(run, "checkpoint-2")


@pytest.fixture
def run(finished, tmp_path):
    """A run with two checkpoints, to be damaged, and its configuration."""
    own = finished[1](output_dir=str(tmp_path / "run"), max_train_steps=4, checkpointing_steps=2)
    train(own)
    return RunDir(tmp_path / "run"), own


def exp_avg(states, value):
    states["state"][0]["exp_avg"] = value(states["state"][0]["exp_avg"])


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


def with_states(checkpoint, change):
    """As an early version wrote it, without a digest; returns the changes of a run that goes on from it."""
    states = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    change(states)
    torch.save(states, checkpoint / "optimizer.pt")
    (checkpoint / "position.json").write_text('{"step": 1, "seed": 3}')
    return {"resume_from_checkpoint": str(checkpoint), "output_dir": str(checkpoint.with_name("goes_on"))}


@pytest.mark.parametrize("name", STATES)
def test_states_that_are_not_the_optimizers_are_refused_before_they_are_used(name, finished, checkpoint):
    change, says = STATES[name]
    going_on = with_states(checkpoint, change)
    with pytest.raises(UserError, match=f"checkpoint-1 is damaged .optimizer.pt: .*{says}"):
        train(finished[1](**going_on))


def test_settings_in_the_states_give_way_to_those_of_the_command_line(finished, checkpoint):
    odd = {"maximize": True, "eps": "large", "betas": (0.0, 0.0)}
    train(finished[1](**with_states(checkpoint, lambda states: states["param_groups"][0].update(odd))))
    assert adapter_sha256(checkpoint.with_name("goes_on")) == adapter_sha256(finished[0])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_step(run, step):
    path = run.checkpoint_path(4) / "position.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": step}))


def copy_of_2(run, name):
    shutil.copy(run.checkpoint_path(2) / name, run.checkpoint_path(4))


DAMAGES = {
    "a bit of the adapter": lambda run: flipped(run.checkpoint_path(4) / "moslora_weights.safetensors"),
    "another checkpoint's optimizer": lambda run: copy_of_2(run, "optimizer.pt"),
    "another checkpoint's position": lambda run: copy_of_2(run, "position.json"),
    "a step far away": lambda run: change_step(run, 10**9),
    "a bit of the optimizer": lambda run: flipped(run.checkpoint_path(4) / "optimizer.pt"),
}


def test_latest_passes_by_a_checkpoint_that_was_changed_and_the_run_ends_as_it_was(run, caplog):
    run_dir, config = run
    newest = run_dir.checkpoint_path(4)
    before = adapter_sha256(run_dir.path)
    whole = {path: path.read_bytes() for path in newest.iterdir()}
    for damage in DAMAGES.values():
        for path, content in whole.items():
            path.write_bytes(content)
        damage(run_dir)
        assert find_checkpoint(run_dir, "latest") == run_dir.checkpoint_path(2)
        with pytest.raises(UserError, match="checkpoint-4 is damaged"):
            check_whole(newest)
    assert caplog.text.count("latest skips checkpoint-4") == len(DAMAGES)
    assert train(replace(config, resume_from_checkpoint="latest")).step == 4
    assert adapter_sha256(run_dir.path) == before


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MISTAKES = {
    "photos": {"instance_data_dir": "missing"},
    "base": {"pretrained_model_name_or_path": "missing"},
    "rank": {"rank": 7, "resume_from_checkpoint": "latest"},
    "targets": {"target_modules": ("missing",)},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_touches_no_finished_run(name, finished):
    folder, config = finished
    before, events = contents(folder), []
    with pytest.raises((UserError, ValueError)):
        train(config(**MISTAKES[name]), events.append)
    assert contents(folder) == before
    assert [event.state for event in events[-1:]] == (["failed"] if name == "rank" else [])  # the others have no plan


def test_a_run_that_is_stopped_before_it_begins_touches_nothing_and_a_resumed_one_only_says_so(finished):
    folder, config = finished
    before = contents(folder)
    assert train(config(), should_stop=lambda: True).step == 0
    assert contents(folder) == before
    folder, config = finished
    before = contents(folder)
    result = train(config(resume_from_checkpoint="checkpoint-1"), should_stop=lambda: True)
    assert result.interrupted and result.step == 1
    after = contents(folder)
    added = {path for path in after if after[path] != before.get(path)}
    assert {str(path) for path in added} == {"metrics.jsonl"} and after.keys() == before.keys()
    end = RunDir(folder).read_metrics()[-1]
    assert (end["type"], end["state"], end["step"]) == ("end", "interrupted", 1)


def test_a_run_in_a_fresh_folder_can_be_watched_while_it_is_prepared(tiny_base, photos, tmp_path, monkeypatch):
    seen, prepare, run = [], loop.prepare, RunDir(tmp_path / "run")
    monkeypatch.setattr(loop, "prepare", lambda *given: seen.extend(run.read_metrics()) or prepare(*given))
    train(tiny_config(tiny_base, photos, run.path, max_train_steps=1))
    assert [event["type"] for event in seen] == ["start"]


def of_another_program(folder):
    """What diffusers' script leaves; returns its files' contents by name."""
    names = [f"checkpoint-2/{name}" for name in ("optimizer.bin", PUBLISHED_NAME)] + [PUBLISHED_NAME, MIXERS_NAME]
    (folder / "checkpoint-2").mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(name.encode())
    return contents(folder)


def test_what_another_program_left_under_our_names_is_set_aside(tiny_base, photos, tmp_path):
    run = tmp_path / "run"
    theirs = of_another_program(run)
    (run / PUBLISHED_NAME).unlink()
    train(tiny_config(tiny_base, photos, run, max_train_steps=2, checkpointing_steps=2))
    del theirs[Path(PUBLISHED_NAME)]
    assert contents(run / "earlier_run_1") == theirs
    assert (run / "checkpoint-2" / "position.json").is_file()


def test_a_run_that_goes_on_from_elsewhere_takes_nothing_of_the_folder_for_its_own(finished, tmp_path):
    source, config = finished
    theirs = of_another_program(tmp_path / "run")
    train(config(output_dir=str(tmp_path / "run"), resume_from_checkpoint=str(source / "checkpoint-1")))
    assert contents(tmp_path / "run" / "earlier_run_1") == theirs
    assert (tmp_path / "run" / PUBLISHED_NAME).read_bytes() == (source / PUBLISHED_NAME).read_bytes()


@pytest.mark.parametrize("resume", [None, "latest"])
def test_an_earlier_run_goes_aside_and_of_a_renamed_folder_only_the_new_names_files_stay(finished, tmp_path, resume):
    folder, config = finished
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    (moved / "run_emb.safetensors").write_bytes(b"tokens")
    train(config(output_dir=moved, max_train_steps=3, resume_from_checkpoint=resume))
    assert [path.name for path in moved.glob("*.kohya.safetensors")] == ["moved.kohya.safetensors"]
    home = max(moved.glob("earlier_run_*"))
    assert {"run.kohya.safetensors", "run_emb.safetensors"} <= {path.name for path in home.iterdir()}
    if not resume:
        assert adapter_sha256(home) == adapter_sha256(folder)
        assert [path.name for path in RunDir(moved).checkpoints()] == ["last"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4096k", "none", str(folder)]
    if not sys.platform.startswith("linux") or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_as_one_and_costs_no_checkpoint(small_disk):
    unet, run = tiny_unet(), RunDir(small_disk)
    inject(unet, MoSLoraConfig(r=32, target_modules=["to_q"]))
    optimizer = torch.optim.AdamW([p for _, p in adapter_parameters(unet)], lr=1e-3)
    parts = ({"unet": unet}, adapter_metadata({"unet": unet}), optimizer)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_checkpoint(run.checkpoint_path(1), Position(1, 0), *parts)
    sizes = {path.name: path.stat().st_size for path in run.checkpoint_path(1).iterdir()}
    room = sizes["moslora_weights.safetensors"] + sizes["optimizer.pt"] // 2
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
    with pytest.raises(OSError) as error:
        save_checkpoint(run.checkpoint_path(2), Position(2, 0), *parts)
    assert error.value.errno == errno.ENOSPC
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "checkpoint-1"]
