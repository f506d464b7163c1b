"""`basis DIR…`: A and B that several subjects share."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dreambooth_moslora.adapters.raw_file import read_raw
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.run_folder import RunDir, files_by_name
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import paint_photos, tiny_config

COMMAND = ("--rank", "3", "--resolution", "64", "--train_batch_size", "1", "--target_modules", "to_q", "conv1")


@pytest.fixture
def subjects(tmp_path):
    for name in ("one", "two"):
        facts = paint_photos(tmp_path / name) / "subject.json"
        facts.write_text(json.dumps({"token": "sks", "class_word": "dog"}))
    return [str(tmp_path / name) for name in ("one", "two")]


@pytest.mark.slow
def test_a_basis_is_learnt_over_two_subjects_and_carries_the_next(subjects, tiny_base, tmp_path, capsys):
    base, out = ("--pretrained_model_name_or_path", str(tiny_base)), tmp_path / "toys_basis.safetensors"
    given = [*subjects, *base, *COMMAND, "--seed", "1", "--learning_rate", "0.1", "--basis_lr", "0.01"]
    start = tmp_path / "start_basis.safetensors"
    assert main(["basis", *given, "--out", str(start), "--max_train_steps", "1", "--basis_lr", "0"]) == 0
    assert main(["basis", *given, "--out", str(out), "--max_train_steps", "6"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == str(out) and "step 6 of 6, loss " in said.err and "0 s left" in said.err
    (before, _), (after, facts) = read_raw(start), read_raw(out)
    moved = {key for key in after if not before[key].equal(after[key])}
    assert moved == {key for key in after if not key.endswith(".mixer")}
    assert not any(after[key].any() for key in after if key.endswith(".mixer"))
    assert facts.trigger_words == () and str(tmp_path) not in facts.to_json()
    assert files_by_name([out], [tmp_path]) == {}
    changes = {"basis": str(out), "rank": 3, "target_modules": ("to_q", "conv1"), "max_train_steps": 2}
    train(tiny_config(tiny_base, tmp_path / "one", tmp_path / "run", **changes))
    raw = load_file(tmp_path / "run" / "last" / "moslora_weights.safetensors")
    assert all(raw[key].equal(after[key]) != key.endswith(".mixer") for key in after)
    assert RunDir(tmp_path / "run").mixers_path.is_file()


def test_mistakes_are_one_line(subjects, tiny_base, tmp_path, capsys):
    base, out = ("--pretrained_model_name_or_path", str(tiny_base)), ("--out", str(tmp_path / "a_basis.safetensors"))
    assert main(["basis", *subjects, *base, "--out", "dog.safetensors"]) == 2
    assert main(["basis", subjects[0], *base, *out]) == 2
    assert main(["basis", *subjects, *base, *out, "--use_dora"]) == 2
    assert main(["basis", str(tmp_path), *base, *out]) == 2
    assert main(["basis", *subjects, *base, *out, "--dry_run"]) == 2
    Path(out[1]).touch()
    assert main(["basis", *subjects, *base, *out]) == 2
    said = capsys.readouterr().err.splitlines()
    wanted = (
        "its name must end in",
        "two subjects or more",
        "--basis and --use_dora: ",
        ": write subject.json into it",
    )
    wanted += ("--dry_run: basis has no such flag", "it is there already")
    assert len(said) == 6 and all(text in line for text, line in zip(wanted, said))


@pytest.mark.parametrize(("rate", "says"), [("-1", "at least 0"), ("200", "at most 100"), ("nan", "a finite number")])
def test_a_rate_that_cannot_train_is_said_before_the_photos_are_looked_at(rate, says, tmp_path, capsys):
    assert (
        main(["basis", str(tmp_path / "none"), "--out", str(tmp_path / "a_basis.safetensors"), "--basis_lr", rate]) == 2
    )
    assert f"--basis_lr {rate}: must be {says}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", ["--adam_beta1 0.5", "--no_enable_bucket", "--find_scale", "--output_dir x", "--lr_power 2"]
)
def test_a_flag_without_an_effect_is_refused_and_not_in_the_help(flags, tmp_path, capsys):
    flag = flags.split()[0].replace("no_", "")
    assert main(["basis", "one", "two", "--out", str(tmp_path / "a_basis.safetensors"), *flags.split()]) == 2
    assert f"{flag}: basis has no such flag. It takes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["basis", "--help"])
    assert flag not in (shown := capsys.readouterr().out) and "--max_grad_norm" in shown


def test_of_a_file_the_settings_that_a_basis_has_are_taken(subjects, tmp_path, monkeypatch):
    file = tmp_path / "rocket.toml"
    file.write_text('rank = 7\nfind_scale = true\nlr_scheduler = "cosine"\nmask_prompt = "rocket"\ntoken = "zwx"\n')
    taken = []
    monkeypatch.setattr("dreambooth_moslora.extras.lab.basis.learn_basis", lambda config, *_: taken.append(config))
    given = ["basis", *subjects, "--out", str(tmp_path / "a_basis.safetensors"), "--config", str(file)]
    assert main(given) == main([*given, "--mask_prompt", "toy"]) == 0
    assert [(one.rank, one.mask_prompt, one.token) for one in taken] == [(7, None, None), (7, "toy", None)]
    assert not taken[0].find_scale and taken[0].lr_scheduler == "constant" and taken[0].report_to == "none"


@pytest.mark.parametrize("facts", [None, "{}", '{"token": "sks"}'])
def test_a_folder_that_does_not_say_what_it_shows_is_told_what_to_write(facts, subjects, tmp_path, capsys):
    file = tmp_path / "two" / "subject.json"
    file.unlink() if facts is None else file.write_text(facts)
    given = ["basis", *subjects, "--out", str(tmp_path / "a_basis.safetensors")]
    assert main(given) == 2
    wanted = 'two: write subject.json into it, such as {"token": "sks", "class_word": "dog"}.\n'
    assert (said := capsys.readouterr().err).endswith(wanted) and "study" not in said
    assert main(["basis", str(tmp_path / "none"), *given[1:]]) == 2
    assert capsys.readouterr().err.endswith("none: there is no such folder.\n")
