"""A basis that several subjects share: learning it, runs that train mixers alone, and what they leave."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth_moslora.adapters.basis import read_mixers
from dreambooth_moslora.adapters.metadata import AdapterMetadata
from dreambooth_moslora.adapters.raw_file import read_raw
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import RAW_NAME, RunDir, files_by_name, run_files
from dreambooth_moslora.generation.params import GenerationParams
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.plan.checks import check_settings
from dreambooth_moslora.settings.sources import checked_recipe, recipe_of
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny import save_tiny_sdxl
from tests.helpers.tiny_training import paint_photos, tiny_config

PARAMS = GenerationParams("a photo of sks dog", seed=3, steps=2, guidance_scale=1.0)


@pytest.fixture(scope="module")
def config(tiny_base, photos):
    def make(output, **changes):
        given = {"basis": "svd", "rank": 3, "lora_alpha": 2, "max_train_steps": 2, "target_modules": ("to_q", "conv1")}
        return tiny_config(tiny_base, photos, output, **given | changes)

    return make


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    """Two subjects on the basis svd, in one folder."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("dog", 1), ("cat", 2)):
        train(config(folder / name, seed=seed, learning_rate=0.3))
    return folder


def picture(subject, *adapters):
    (image,) = subject.draw(PARAMS.__class__(**vars(PARAMS) | {"adapters": tuple(adapters)}))
    return np.asarray(image.pixels).astype(int)


@pytest.fixture
def loaded(tiny_base, runs):
    subject = SubjectPipeline.from_base(tiny_base)
    for name in ("dog", "cat"):
        subject.load_adapter(runs / name)
        assert subject.load_adapter(RunDir(runs / name).mixers_path) == f"{name}@mixers"
    return subject


@pytest.mark.slow
def test_mixers_draw_what_the_folded_files_draw_alone_and_together(loaded, tiny_base):
    base = picture(SubjectPipeline.from_base(tiny_base))
    for scales in ((1.0, 0.0), (0.0, 1.0), (0.4, 0.0), (0.8, 0.7), (1.0, 0.0)):
        folded = picture(loaded, ("dog", scales[0]), ("cat", scales[1]))
        mixed = picture(loaded, ("dog@mixers", scales[0]), ("cat@mixers", scales[1]))
        assert np.abs(folded - mixed).max() <= 1 < np.abs(folded - base).max()
    one_of_each = picture(loaded, ("dog", 0.8), ("cat@mixers", 0.7))
    assert np.abs(one_of_each - picture(loaded, ("dog", 0.8), ("cat", 0.7))).max() <= 1
    assert np.array_equal(picture(loaded), base)
    for name in ("dog@mixers", "cat@mixers"):
        loaded.unload_adapter(name)
    assert not any(key.startswith("basis") for key in loaded.pipeline.unet.peft_config)


@pytest.mark.slow
def test_the_files_name_the_basis_and_the_mixers_alone_have_moved(runs):
    mixers = read_mixers(RunDir(runs / "dog").mixers_path)
    assert mixers.metadata.basis["kind"] == "svd" and len(mixers.metadata.basis["sha256"]) == 64
    assert mixers.values.any() and mixers.metadata.recipe["basis"] == "svd"
    dog, cat = (load_file(runs / name / "last" / RAW_NAME) for name in ("dog", "cat"))
    assert all(torch.equal(dog[key], cat[key]) != key.endswith(".mixer") for key in dog)
    assert {"dog", "dog@mixers"} <= set(files_by_name(run_files([runs / "dog"]), [runs]))


@pytest.mark.slow
def test_mixers_of_another_base_are_said_in_one_line(runs, tmp_path):
    other = save_tiny_sdxl(tmp_path)
    unet = other / "unet" / "diffusion_pytorch_model.safetensors"
    unet.write_bytes(unet.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match=r"^mixers\.safetensors was made for other weights: its basis is of a base"):
        SubjectPipeline.from_base(other).load_adapter(RunDir(runs / "dog").mixers_path)


@pytest.mark.slow
def test_a_basis_from_a_file_is_found_beside_above_or_by_name(runs, config, tiny_base, tmp_path):
    file = runs / "dog" / "last" / RAW_NAME
    basis = tmp_path / "of" / "toys.safetensors"
    basis.parent.mkdir()
    basis.write_bytes(file.read_bytes())
    train(config(tmp_path / "of" / "run", basis=str(basis), learning_rate=0.3))
    mixers = RunDir(tmp_path / "of" / "run").mixers_path
    assert read_mixers(mixers).metadata.basis["file"] == "toys.safetensors"
    assert "basis" not in read_mixers(mixers).metadata.recipe
    subject = SubjectPipeline.from_base(tiny_base)
    names = subject.load_adapter(mixers.parent), subject.load_adapter(mixers)
    folded, mixed = (picture(subject, (name, 1.0)) for name in names)
    assert np.abs(folded - mixed).max() <= 1
    moved = basis.rename(tmp_path / "moved.safetensors")
    fresh = SubjectPipeline.from_base(tiny_base)
    with pytest.raises(UserError, match=r"needs its basis, 'toys\.safetensors' .* name it with --basis"):
        fresh.load_adapter(mixers)
    fresh.bases.files.append(moved)
    assert fresh.load_adapter(mixers) == "run@mixers"


@pytest.mark.slow
def test_a_resumed_run_needs_the_same_basis(runs, config, tmp_path):
    resumed = {"resume_from_checkpoint": str(runs / "dog" / "last"), "seed": 1, "max_train_steps": 4}
    for basis, asked in ((None, "None"), (str(runs / "dog" / "last" / RAW_NAME), "file")):
        with pytest.raises(UserError, match=f"--basis: last has svd; you ask for {asked}"):
            train(config(tmp_path / "run", **resumed, basis=basis))


def test_a_basis_that_is_none_is_said_before_the_base_is_loaded(config, tmp_path, tiny_base):
    single, folded = tmp_path / "model.safetensors", tmp_path / "pytorch_lora_weights.safetensors"
    single.write_bytes((tiny_base / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    save_file({"up": torch.ones(1)}, folded, {"moslora": AdapterMetadata(rank=4, alpha=4, mixer="none").to_json()})
    for says, changes in (
        ("--basis svd: model.safetensors is a single file", {"pretrained_model_name_or_path": str(single)}),
        ("there is no such file; give a raw adapter file, or the word svd", {"basis": "nowhere.safetensors"}),
        ("it is no raw adapter file", {"basis": str(single)}),
        ("it is no raw adapter file", {"basis": str(folded)}),
    ):
        with pytest.raises(UserError, match=says):
            check_settings(config(tmp_path / "run", **changes))


def test_a_recipe_tells_the_basis_svd_and_never_a_file(config, tmp_path):
    assert recipe_of(config(tmp_path))["basis"] == "svd" and "basis" not in recipe_of(config(tmp_path, basis=None))
    assert "basis" not in recipe_of(config(tmp_path, basis="secret.safetensors"))
    assert checked_recipe({"basis": "svd"}) == ({"basis": "svd"}, [])
    assert checked_recipe({"basis": "secret.safetensors"}) == ({}, ["--basis names a file"])


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
    out = tmp_path / "a_basis.safetensors"
    usual = ["--pretrained_model_name_or_path", str(tiny_base), "--out", str(out)]
    mistakes = {
        "its name must end in": [*subjects, "--out", "dog.safetensors"],
        "two subjects or more": subjects[:1],
        "--basis and --use_dora: ": [*subjects, "--use_dora"],
        ": write subject.json into it": [str(tmp_path)],
        "--dry_run: basis has no such flag": [*subjects, "--dry_run"],
        "--basis_lr -1: must be at least 0": [str(tmp_path / "none"), "--basis_lr", "-1"],
        "--basis_lr 200: must be at most 100": [str(tmp_path / "none"), "--basis_lr", "200"],
        "--basis_lr nan: must be a finite number": [str(tmp_path / "none"), "--basis_lr", "nan"],
        "it is there already": subjects,
    }
    for says, words in mistakes.items():
        if says == "it is there already":
            out.touch()
        assert main(["basis", *usual, *words]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert says in said


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
    file, taken = tmp_path / "rocket.toml", []
    file.write_text('rank = 7\nfind_scale = true\nlr_scheduler = "cosine"\nmask_prompt = "rocket"\ntoken = "zwx"\n')
    monkeypatch.setattr("dreambooth_moslora.extras.lab.basis.learn_basis", lambda config, *_: taken.append(config))
    given = ["basis", *subjects, "--out", str(tmp_path / "a_basis.safetensors"), "--config", str(file)]
    assert main(given) == main([*given, "--mask_prompt", "toy"]) == 0
    assert [(one.rank, one.mask_prompt, one.token) for one in taken] == [(7, None, None), (7, "toy", None)]


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
