"""A mistake, or a stop, while a run is prepared leaves the earlier run in the folder as it was."""

import shutil
from pathlib import Path

import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import MIXERS_NAME, PUBLISHED_NAME, RunDir
from dreambooth_moslora.training import loop as trainer_module
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import paint_photos, tiny_config


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory):
    """(run folder, its configuration with changes)."""
    folder = tmp_path_factory.mktemp("finished")
    photos = paint_photos(folder / "photos")

    def config(**changes):
        return tiny_config(tiny_base, photos, folder / "run", **{"max_train_steps": 2, **changes})

    train(config(checkpointing_steps=1))
    return folder / "run", config


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


def test_a_new_run_that_is_stopped_before_it_begins_touches_nothing(finished):
    folder, config = finished
    before = contents(folder)
    assert train(config(), should_stop=lambda: True).step == 0
    assert contents(folder) == before


def test_a_resumed_run_that_is_stopped_before_it_begins_is_at_its_step_and_only_says_so(finished):
    folder, config = finished
    before = contents(folder)
    result = train(config(resume_from_checkpoint="checkpoint-1"), should_stop=lambda: True)
    assert result.interrupted and result.step == 1
    after = contents(folder)
    added = {path for path in after if after[path] != before.get(path)}
    assert {str(path) for path in added} == {"metrics.jsonl"} and after.keys() == before.keys()
    end = RunDir(folder).read_metrics()[-1]
    assert (end["type"], end["state"], end["step"]) == ("end", "interrupted", 1)


def test_a_run_in_a_fresh_folder_can_be_watched_while_it_is_prepared(tiny_base, tmp_path, monkeypatch):
    seen, prepare = [], trainer_module.prepare

    def look(*arguments):
        seen.extend(RunDir(tmp_path / "run").read_metrics())
        return prepare(*arguments)

    monkeypatch.setattr(trainer_module, "prepare", look)
    train(tiny_config(tiny_base, paint_photos(tmp_path / "photos"), tmp_path / "run", max_train_steps=1))
    assert [event["type"] for event in seen] == ["start"]


def of_another_program(folder):
    """What diffusers' script leaves; returns its files' contents by name."""
    names = (
        *("checkpoint-2/optimizer.bin", "checkpoint-2/pytorch_lora_weights.safetensors"),
        *(PUBLISHED_NAME, MIXERS_NAME),
    )
    (folder / "checkpoint-2").mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(name.encode())
    return contents(folder)


def test_what_another_program_left_under_our_names_is_set_aside(tiny_base, tmp_path):
    photos, run = paint_photos(tmp_path / "photos"), tmp_path / "run"
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
def test_after_a_run_folder_is_renamed_only_the_new_names_files_are_left_at_its_top(finished, tmp_path, resume):
    folder, config = finished
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    (moved / "run_emb.safetensors").write_bytes(b"tokens")
    train(config(output_dir=moved, max_train_steps=3, resume_from_checkpoint=resume))
    assert [path.name for path in moved.glob("*.kohya.safetensors")] == ["moved.kohya.safetensors"]
    home = max(moved.glob("earlier_run_*"))
    assert {"run.kohya.safetensors", "run_emb.safetensors"} <= {path.name for path in home.iterdir()}
