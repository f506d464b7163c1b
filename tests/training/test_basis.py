"""A frozen basis: its directions, what learns on it, learning it over several subjects, runs on it."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth_moslora.adapters import basis as frozen
from dreambooth_moslora.adapters import fast_linear, moslora, raw_file
from dreambooth_moslora.adapters.basis import FileBasis, SvdBasis, leading_directions
from dreambooth_moslora.adapters.metadata import AdapterMetadata
from dreambooth_moslora.adapters.moslora import MoSLoraConfig, adapter_layers, adapter_parameters, inject
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import RAW_NAME, files_by_name
from dreambooth_moslora.plan import processes
from dreambooth_moslora.plan.checks import check_settings
from dreambooth_moslora.settings.sources import checked_recipe, recipe_of
from dreambooth_moslora.training.loop import train
from dreambooth_moslora.training.step import TrainStep
from tests.adapters.test_fast_linear import unet_loss
from tests.helpers.live_adapters import facts_of
from tests.helpers.tiny import tiny_unet
from tests.helpers.tiny_training import paint_photos, tiny_config

COMMAND = ("--rank", "3", "--resolution", "64", "--train_batch_size", "1", "--target_modules", "to_q", "conv1")
NOTE = {"kind": "svd", "sha256": "ab" * 32, "file": ""}
LAYERS = ["to_q", "conv1"]
QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


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


@pytest.mark.slow
def test_a_resumed_run_needs_the_same_basis(runs, config, tmp_path):
    resumed = {"resume_from_checkpoint": str(runs / "dog" / "last"), "seed": 1, "max_train_steps": 4}
    for basis, asked in ((None, "None"), (str(runs / "dog" / "last" / RAW_NAME), "file")):
        with pytest.raises(UserError, match=f"--basis: last has svd; you ask for {asked}"):
            train(config(tmp_path / "run", **resumed, basis=basis))


def test_a_basis_that_is_none_is_said_before_the_base_is_loaded_and_a_recipe_names_no_file(config, tmp_path, tiny_base):
    single, folded = tmp_path / "model.safetensors", tmp_path / "pytorch_lora_weights.safetensors"
    shutil.copy(tiny_base / "unet" / "diffusion_pytorch_model.safetensors", single)
    save_file({"up": torch.ones(1)}, folded, {"moslora": AdapterMetadata(rank=4, alpha=4, mixer="none").to_json()})
    for says, changes in (
        ("--basis svd: model.safetensors is a single file", {"pretrained_model_name_or_path": str(single)}),
        ("there is no such file; give a raw adapter file, or the word svd", {"basis": "nowhere.safetensors"}),
        ("it is no raw adapter file", {"basis": str(single)}),
        ("it is no raw adapter file", {"basis": str(folded)}),
    ):
        with pytest.raises(UserError, match=says):
            check_settings(config(tmp_path / "run", **changes))
    assert recipe_of(config(tmp_path))["basis"] == "svd"
    assert not any("basis" in recipe_of(config(tmp_path, basis=basis)) for basis in (None, "secret.safetensors"))
    assert checked_recipe({"basis": "svd"}) == ({"basis": "svd"}, [])
    assert checked_recipe({"basis": "secret.safetensors"}) == ({}, ["--basis names a file"])


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
    (before, _), (after, facts) = raw_file.read_raw(start), raw_file.read_raw(out)
    moved = {key for key in after if not before[key].equal(after[key])}
    assert moved == {key for key in after if not key.endswith(".mixer")}
    assert not any(after[key].any() for key in after if key.endswith(".mixer"))
    assert facts.trigger_words == () and str(tmp_path) not in facts.to_json()
    assert files_by_name([out], [tmp_path]) == {}
    changes = {"basis": str(out), "rank": 3, "target_modules": ("to_q", "conv1"), "max_train_steps": 2}
    train(tiny_config(tiny_base, tmp_path / "one", tmp_path / "run", **changes))
    raw = load_file(tmp_path / "run" / "last" / "moslora_weights.safetensors")
    assert all(raw[key].equal(after[key]) != key.endswith(".mixer") for key in after)


@pytest.mark.slow
def test_no_more_images_pass_at_once_than_the_plan_says(subjects, tiny_base, tmp_path, monkeypatch):
    """A photo passed with its prior, whatever `--memory auto` had chosen for the free memory."""
    passed, predict = [], TrainStep.predict
    monkeypatch.setattr(TrainStep, "predict", lambda step, rows: passed.append(len(rows)) or predict(step, rows))

    def learnt(name: str, *flags: str) -> dict[str, torch.Tensor]:
        passed.clear()
        out = tmp_path / f"{name}_basis.safetensors"
        given = [*subjects, "--pretrained_model_name_or_path", str(tiny_base), *COMMAND, "--max_train_steps", "2"]
        given += ["--seed", "1", "--with_prior_preservation", "--prior", "adapter_off", *flags]
        assert main(["basis", *given, "--out", str(out)]) == 0
        return raw_file.read_raw(out)[0]

    whole = learnt("whole")
    assert max(passed) == 2
    apart = learnt("apart", "--images_at_once", "1")
    assert max(passed) == 1 and all(torch.allclose(apart[key], whole[key], atol=1e-4) for key in whole)


@pytest.mark.slow
def test_in_fp16_the_loss_is_scaled_and_a_step_that_overflows_is_skipped(subjects, tiny_base, tmp_path, monkeypatch):
    """With the scaler that accelerate has on a GPU; the base stays in fp32, which CPUs compute."""
    make_accelerator = processes.make_accelerator

    def learnt(name: str, scale: float = 0.0, rate: str = "0.01") -> dict[str, torch.Tensor]:
        def make(config, run_dir):
            accelerator = make_accelerator(config, run_dir)
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
            return accelerator

        monkeypatch.setattr(processes, "make_accelerator", make)
        out = tmp_path / f"{name}_basis.safetensors"
        given = [*subjects, "--pretrained_model_name_or_path", str(tiny_base), *COMMAND, "--max_train_steps", "4"]
        given += ["--seed", "1", "--learning_rate", "0.1", "--basis_lr", rate]
        assert main(["basis", *given, "--out", str(out)]) == 0
        return raw_file.read_raw(out)[0]

    start, plain = learnt("start", rate="0"), learnt("plain")
    scaled, skipped = learnt("scaled", 2.0**10), learnt("skipped", float("inf"))
    assert any(not start[key].equal(plain[key]) for key in plain)
    assert all(torch.allclose(scaled[key], plain[key], atol=1e-4) for key in plain)
    assert all(start[key].equal(skipped[key]) for key in plain)


def test_a_flag_without_an_effect_is_refused_and_not_in_the_help(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["basis", "--help"])
    shown = capsys.readouterr().out
    for flags in ("--adam_beta1 0.5", "--no_enable_bucket", "--find_scale", "--output_dir x", "--lr_power 2"):
        flag = flags.split()[0].replace("no_", "")
        assert main(["basis", "one", "two", "--out", str(tmp_path / "a_basis.safetensors"), *flags.split()]) == 2
        assert f"{flag}: basis has no such flag. It takes" in capsys.readouterr().err
        assert flag not in shown and "--max_grad_norm" in shown


def test_of_a_file_the_settings_that_a_basis_has_are_taken(subjects, tmp_path, monkeypatch):
    file, taken = tmp_path / "rocket.toml", []
    file.write_text('rank = 7\nfind_scale = true\nlr_scheduler = "cosine"\nmask_prompt = "rocket"\ntoken = "zwx"\n')
    monkeypatch.setattr("dreambooth_moslora.extras.lab.basis.learn_basis", lambda config, *_: taken.append(config))
    given = ["basis", *subjects, "--out", str(tmp_path / "a_basis.safetensors"), "--config", str(file)]
    assert main(given) == main([*given, "--mask_prompt", "toy"]) == 0
    assert [(one.rank, one.mask_prompt, one.token) for one in taken] == [(7, None, None), (7, "toy", None)]


def test_mistakes_are_one_line(subjects, tiny_base, tmp_path, capsys):
    out, base = tmp_path / "a_basis.safetensors", ["--pretrained_model_name_or_path", str(tiny_base)]

    def said(*words: str) -> str:
        assert main(["basis", *base, "--out", str(out), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    mistakes = {
        "its name must end in": [*subjects, "--out", "dog.safetensors"],
        "two subjects or more": subjects[:1],
        "--basis and --use_dora: ": [*subjects, "--use_dora"],
        ": write subject.json into it": [str(tmp_path)],
        "--dry_run: basis has no such flag": [*subjects, "--dry_run"],
        "--basis_lr -1: must be at least 0": [str(tmp_path / "none"), "--basis_lr", "-1"],
        "--basis_lr 200: must be at most 100": [str(tmp_path / "none"), "--basis_lr", "200"],
        "--basis_lr nan: must be a finite number": [str(tmp_path / "none"), "--basis_lr", "nan"],
    }
    for says, words in mistakes.items():
        assert says in said(*words)
    out.touch()
    assert "it is there already" in said(*subjects)
    out.unlink()
    for facts in (None, "{}", '{"token": "sks"}'):
        file = tmp_path / "two" / "subject.json"
        file.unlink() if facts is None else file.write_text(facts)
        line = said(*subjects)
        assert line.endswith('two: write subject.json into it, such as {"token": "sks", "class_word": "dog"}.')
        assert "study" not in line
    assert said(str(tmp_path / "none"), *subjects).endswith("none: there is no such folder.")


@pytest.fixture(scope="module")
def basis(tiny_base):
    return SvdBasis(tiny_base)


def on_basis(basis, rank=4, seed=None, **options):
    """A UNet with the adapter on the basis; with a seed its mixers have moved."""
    unet = tiny_unet()
    inject(unet, MoSLoraConfig(**{"r": rank, "lora_alpha": rank, "target_modules": LAYERS, "mixer": "zero"} | options))
    frozen.put_basis(basis, unet)
    frozen.freeze_basis(unet)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, mixer in adapter_parameters(unet):
                mixer.normal_(std=0.1, generator=generator)
    return unet


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (6, 5, 3, 3)])
def test_the_directions_are_the_weights_leading_singular_vectors(shape):
    """Beyond a narrow weight they are zero."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    down, up = leading_directions(weight, 5)
    left, sizes, right = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
    wanted = left[:, :5] @ right[:5] * sizes[:5].mean()
    assert down.shape == (5, *shape[1:]) and up.shape == (shape[0], 5)
    assert torch.allclose((up.double() @ down.double().flatten(1)), wanted, atol=1e-6)
    assert all(torch.equal(one, other) for one, other in zip((down, up), leading_directions(weight, 5)))
    down, up = leading_directions(weight[:3], 5)
    assert not down[3:].any() and not up[:, 3:].any() and up[:, :3].any(0).all()
    assert not any(part.isnan().any() for part in leading_directions(torch.zeros(4, 6), 2))


def test_the_mixers_alone_learn_and_the_fast_path_gives_pefts_gradients(basis):
    slow, fast = on_basis(basis, seed=1), on_basis(basis, seed=1)
    names = [name for name, _ in adapter_parameters(slow)]
    assert names and all(name.endswith(".lora_B.mixer") for name in names)
    assert fast_linear.enable_fast_path(fast)
    for unet in (slow, fast):
        with fast_linear.WorkingCopies(unet).for_one_step() as copies:
            unet_loss(unet).backward()
            copies.collect()
    for (name, one), (_, other) in zip(adapter_parameters(slow), adapter_parameters(fast), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-7), name
    layers = adapter_layers(fast).values()
    assert all(layer.lora_A["default"].weight.grad is None for layer in layers)
    assert all(layer.lora_B["default"].up.grad is None for layer in layers)


def test_a_raw_file_is_a_basis_for_its_own_layers_and_ranks(basis, tmp_path):
    unet, file = on_basis(basis, seed=1), tmp_path / "basis.safetensors"
    raw_file.save_raw({"unet": unet}, file, facts_of({"unet": unet}))
    found = FileBasis(file)
    frozen.put_basis(found, twin := on_basis(basis, seed=2))
    own, there = ({p: moslora.matrices_of(x, "default") for p, x in adapter_layers(u).items()} for u in (unet, twin))
    assert all(torch.equal(own[p].down, there[p].down) and torch.equal(own[p].up, there[p].up) for p in own)
    assert not any(matrices.mixer.any() for matrices in there.values())
    path = next(iter(own))
    narrow = SimpleNamespace(note=NOTE, layer=lambda path, rank: [one[:, 1:] for one in basis.layer(path, rank)])
    for call, said in (
        (lambda: found.layer(path, 2), r"basis\.safetensors has rank 4 in .*, not 2"),
        (lambda: found.layer("nowhere", 4), r"basis\.safetensors has no layer nowhere"),
        (lambda: frozen.put_basis(narrow, on_basis(basis, seed=2)), "made for another base"),
    ):
        with pytest.raises(UserError, match=said):
            call()


def test_the_basis_svd_is_of_the_files_on_the_disk_and_finite_where_rows_are_equal(tiny_base):
    basis = SvdBasis(tiny_base)
    weights = load_file(tiny_base / "unet" / "diffusion_pytorch_model.safetensors")
    path = next(name for name in weights if name.endswith("attn1.to_q.weight")).removesuffix(".weight")
    wanted = leading_directions(weights[f"{path}.weight"], 3)
    assert all(torch.equal(one, other) for one, other in zip(basis.layer(path, 3), wanted))
    assert len(basis.note["sha256"]) == 64 and json.dumps(basis.note)
    with pytest.raises(UserError, match="needs a base in a diffusers folder"):
        SvdBasis(None)
    with pytest.raises(UserError, match=r"no nowhere\.weight"):
        basis.layer("nowhere", 3)
    weight = torch.randn(24, 40).repeat_interleave(2, 0)
    for part in (*leading_directions(weight, 40), *leading_directions(weight.T, 40)):
        assert part.half().isfinite().all() and part.abs().max() < 10 * weight.abs().max()
