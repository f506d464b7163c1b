"""A frozen basis: its directions, what learns on it, learning it over several subjects, runs on
it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.run_folder import RAW_NAME, RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.lab import learn_basis
from dreambooth_moslora.extras.lab.basis import (
    freeze_basis,
    leading_directions,
    put_basis,
    train_on_basis,
)
from dreambooth_moslora.lora import raw_file
from dreambooth_moslora.method import fast_linear, moslora
from dreambooth_moslora.method.moslora import MoSLoraConfig, adapter_parameters, inject
from tests.helpers.live_adapters import facts_of
from tests.helpers.tiny import tiny_unet
from tests.helpers.tiny_training import paint_photos, tiny_config
from tests.method.test_fast_linear import unet_loss

COMMAND = (
    "--rank",
    "3",
    "--resolution",
    "64",
    "--train_batch_size",
    "1",
    "--target_modules",
    "to_q",
    "conv1",
)
LAYERS = ["to_q", "conv1"]


def test_in_a_run_on_the_basis_svd_the_mixers_alone_learn(tiny_base, tmp_path):
    photos = paint_photos(tmp_path / "photos")
    given = {
        "rank": 3,
        "lora_alpha": 2,
        "max_train_steps": 2,
        "target_modules": LAYERS,
        "use_ema": True,
    }
    config = tiny_config(tiny_base, photos, tmp_path / "run", learning_rate=0.3, **given)
    assert train_on_basis(config, "svd").step == 2
    weights = load_file(tiny_base / "unet" / "diffusion_pytorch_model.safetensors")
    tensors, _ = raw_file.read_raw(tmp_path / "run" / "last" / RAW_NAME)
    for path, parts in raw_file.by_module(tensors)["unet"].items():
        down, up = leading_directions(weights[f"{path}.weight"], 3)
        assert torch.equal(parts["lora_A"], down) and torch.equal(parts["lora_B"], up)
        assert parts["mixer"].any()
    assert RunDir(config.output_dir).adapter_path.is_file()


@pytest.fixture
def subjects(tmp_path):
    for name in ("one", "two"):
        facts = paint_photos(tmp_path / name) / "subject.json"
        facts.write_text(json.dumps({"token": "sks", "class_word": "dog"}))
    return [str(tmp_path / name) for name in ("one", "two")]


@pytest.mark.slow
def test_a_basis_is_learnt_over_two_subjects_and_carries_the_next(
    subjects, tiny_base, tmp_path, capsys
):
    base, out = (
        ("--pretrained_model_name_or_path", str(tiny_base)),
        tmp_path / "toys_basis.safetensors",
    )
    given = [
        *subjects,
        *base,
        *COMMAND,
        "--seed",
        "1",
        "--learning_rate",
        "0.1",
        "--basis_lr",
        "0.01",
    ]
    start = tmp_path / "start_basis.safetensors"
    assert (
        main(["basis", *given, "--out", str(start), "--max_train_steps", "1", "--basis_lr", "0"])
        == 0
    )
    assert (
        main(["basis", *given, "--start", str(start), "--out", str(out), "--max_train_steps", "6"])
        == 0
    )
    said = capsys.readouterr()
    assert (
        said.out.splitlines()[-1] == str(out)
        and "step 6 of 6, loss " in said.err
        and "0 s left" in said.err
    )
    (before, _), (after, facts) = raw_file.read_raw(start), raw_file.read_raw(out)
    moved = {key for key in after if not before[key].equal(after[key])}
    assert moved == {key for key in after if not key.endswith(".mixer")}
    assert not any(after[key].any() for key in after if key.endswith(".mixer"))
    assert facts.trigger_words == () and str(tmp_path) not in facts.to_json()
    changes = {"rank": 3, "target_modules": ("to_q", "conv1"), "max_train_steps": 2}
    train_on_basis(tiny_config(tiny_base, tmp_path / "one", tmp_path / "run", **changes), str(out))
    raw = load_file(tmp_path / "run" / "last" / "moslora_weights.safetensors")
    assert all(raw[key].equal(after[key]) != key.endswith(".mixer") for key in after)


def test_of_a_file_the_settings_that_a_basis_has_are_taken(subjects, tmp_path, monkeypatch):
    file, taken = tmp_path / "rocket.toml", []
    file.write_text(
        'rank = 7\nfind_scale = true\nlr_scheduler = "cosine"\nmask_prompt = "rocket"\n'
        'token = "zwx"\n'
    )
    monkeypatch.setattr(learn_basis, "learn_basis", lambda config, *_, **__: taken.append(config))
    given = [
        "basis",
        *subjects,
        "--out",
        str(tmp_path / "a_basis.safetensors"),
        "--config",
        str(file),
    ]
    assert main(given) == main([*given, "--mask_prompt", "toy"]) == 0
    assert [(one.rank, one.mask_prompt, one.token) for one in taken] == [
        (7, None, None),
        (7, "toy", None),
    ]


def test_mistakes_are_one_line(subjects, tiny_base, tmp_path, capsys):
    out, base = (
        tmp_path / "a_basis.safetensors",
        ["--pretrained_model_name_or_path", str(tiny_base)],
    )

    def said(*words: str) -> str:
        assert main(["basis", *base, "--out", str(out), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    mistakes = {
        "two subjects or more": subjects[:1],
        "--use_dora: basis has no such flag": [*subjects, "--use_dora"],
        ": write subject.json into it": [str(tmp_path)],
        "--dry_run: basis has no such flag": [*subjects, "--dry_run"],
        "--basis_lr -1: must be at least 0": [str(tmp_path / "none"), "--basis_lr", "-1"],
    }
    for says, words in mistakes.items():
        assert says in said(*words)
    out.touch()
    assert "it is there already" in said(*subjects)
    out.unlink()
    assert said(str(tmp_path / "none"), *subjects).endswith("none: there is no such folder.")


def on_basis(basis="svd", **options):
    """A UNet with the adapter on the basis, in which the mixers alone learn."""
    unet = tiny_unet()
    inject(unet, MoSLoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": LAYERS} | options))
    put_basis(basis, {"unet": unet})
    freeze_basis({"unet": unet})
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
    assert all(
        torch.equal(one, other) for one, other in zip((down, up), leading_directions(weight, 5))
    )
    down, up = leading_directions(weight[:3], 5)
    assert not down[3:].any() and not up[:, 3:].any() and up[:, :3].any(0).all()
    assert not any(part.isnan().any() for part in leading_directions(torch.zeros(4, 6), 2))


def test_directions_are_finite_where_rows_are_equal():
    weight = torch.randn(24, 40).repeat_interleave(2, 0)
    for part in (*leading_directions(weight, 40), *leading_directions(weight.T, 40)):
        assert part.half().isfinite().all() and part.abs().max() < 10 * weight.abs().max()


def test_on_a_basis_the_fast_path_gives_pefts_gradients_of_the_mixers_and_no_others():
    slow, fast = on_basis(), on_basis()
    assert fast_linear.enable_fast_path(fast)
    for unet in (slow, fast):
        with torch.no_grad():
            for number, (_, mixer) in enumerate(moslora.mixer_parameters(unet)):
                mixer.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
        with fast_linear.WorkingCopies(unet).for_one_step() as copies:
            unet_loss(unet).backward()
            copies.collect()
    for (name, one), (_, other) in zip(
        adapter_parameters(slow), adapter_parameters(fast), strict=True
    ):
        if name.endswith(".mixer"):
            assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-7), name
        else:
            assert one.grad is other.grad is None, name


def test_a_raw_file_is_a_basis_for_its_own_layers_and_ranks(tmp_path):
    unet, file = on_basis(), tmp_path / "basis.safetensors"
    raw_file.save_raw({"unet": unet}, file, facts_of({"unet": unet}))
    own, there = (dict(adapter_parameters(one)) for one in (unet, on_basis(str(file))))
    assert all(torch.equal(own[name], there[name]) for name in own)
    for says, options in (
        ("is no A and B for the mixer of .*: give its rank and base", {"r": 3}),
        ("is no A and B for the mixer of ", {"mixer": "none"}),
        ("has no layer ", {"target_modules": ["to_k"]}),
    ):
        with pytest.raises(UserError, match=says):
            on_basis(str(file), **options)
