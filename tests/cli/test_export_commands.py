"""`export`, `info` and `generate` as a person calls them, on our files and on other people's."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RAW_NAME, RunDir
from dreambooth_moslora.lora.describe import describe
from dreambooth_moslora.lora.metadata import DORA_NOTE
from dreambooth_moslora.lora.raw_file import build_adapter_metadata, save_raw
from dreambooth_moslora.lora.writer import publish
from tests.helpers.live_adapters import live


def run_main(*arguments) -> int:
    return main([str(word) for word in arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoint-3"
    folder.mkdir()
    components = live()
    facts = build_adapter_metadata(components, base_id="some/base", trigger_words=("sks dog",))
    save_raw(components, folder / RAW_NAME, facts)
    publish(components, folder, "dog", facts)
    return folder


def test_export_without_base_equals_the_live_adapter(checkpoint, tmp_path, capsys):
    assert run_main("export", checkpoint, "--out", tmp_path / "dog") == 0
    captured = capsys.readouterr().out
    assert "largest relative difference" in captured and "dog.kohya.safetensors" in captured
    files = load_file(checkpoint / PUBLISHED_NAME), load_file(tmp_path / "dog" / PUBLISHED_NAME)
    assert files[0].keys() == files[1].keys() and all(
        torch.equal(files[0][k], files[1][k]) for k in files[0]
    )
    assert run_main("export", checkpoint / RAW_NAME, "--out", tmp_path, "--dtype", "fp16") == 0


def test_a_runs_own_file_is_not_replaced(checkpoint, tmp_path, capsys):
    run = RunDir(tmp_path / "dog")
    run.path.mkdir()
    run.config_path.write_text("{}")
    for out in (run.path, run.best_dir):
        assert run_main("export", checkpoint, "--out", out) == 2
        assert f"give another folder, such as {run.path}_export." in capsys.readouterr().err
    assert [path.name for path in run.path.iterdir()] == [run.config_path.name]


def test_export_of_dora_says_what_other_programs_make_of_it(tmp_path, capsys):
    components = live(target_modules=["attn1.to_q"], use_dora=True)
    save_raw(
        components, tmp_path / RAW_NAME, build_adapter_metadata(components, base_id="some/base")
    )
    assert run_main("export", tmp_path / RAW_NAME, "--out", tmp_path / "dog") == 0
    assert f"Note: {DORA_NOTE}." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "out", "says"),
    [
        (".", "new", "holds neither"),
        ("absent", "new", "there is no file or folder"),
        (None, "file", "File exists"),
    ],
)
def test_an_export_that_cannot_be_is_one_line(
    checkpoint, source, out, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("here")
    assert run_main("export", source or checkpoint, "--out", out) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1


def test_info_of_our_three_files(checkpoint, capsys):
    assert run_main("info", "--json", *sorted(checkpoint.glob("*.safetensors"))) == 0
    kohya, raw, published = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    for facts in (kohya, raw, published):
        assert facts["base"] == "some/base" and facts["trigger_words"] == "sks dog"
    for facts in (kohya, published):
        assert facts["modules"] == {"unet": 88} and facts["ranks"] == {"4": 88}
    assert (raw["rank"], raw["alpha"], raw["mixer"]) == (4, 11, "orthogonal")
    assert kohya["alpha"] == "4" and "kohya keys" in kohya["kind"]
    assert published["kind"] == "published by dreambooth_moslora, PEFT keys"


def test_info_of_other_peoples_files(tmp_path, capsys):
    down, up = torch.randn(8, 16), torch.randn(16, 8)
    kohya = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    kohya = {f"lora_te1_x.{name}": value for name, value in kohya.items()}
    header = {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.trigger_phrase": "sks"}
    save_file(kohya, tmp_path / "kohya.safetensors", header)
    old = {
        "unet.a.processor.to_q_lora.down.weight": down,
        "unet.a.processor.to_q_lora.up.weight": up,
    }
    save_file(old, tmp_path / "old.safetensors")
    save_file({"a.lokr_w1": up}, tmp_path / "lokr.safetensors")
    expected = {
        "alpha": "2",
        "base": "sdxl_base_v1-0",
        "modules": {"text_encoder": 1},
    }
    assert (
        describe(tmp_path / "kohya.safetensors").items()
        >= (expected | {"trigger_words": "sks"}).items()
    )
    assert describe(tmp_path / "old.safetensors")["modules"] == {"unet": 1}
    assert describe(tmp_path / "lokr.safetensors")["kind"] == "LyCORIS LoKr"
    unfolded = {
        "lora_A.weight": torch.ones(2, 3),
        "lora_B.up": torch.ones(3, 2),
        "lora_B.mixer": torch.ones(2, 2),
    }
    save_file(
        {f"base_model.model.x.{k}": t for k, t in unfolded.items()}, tmp_path / "peft.safetensors"
    )
    assert describe(tmp_path / "peft.safetensors")["kind"] == "MoSLoRA in PEFT's form, unfolded"
    save_file({"weight": up}, tmp_path / "model.safetensors")
    assert run_main("info", tmp_path / "old.safetensors", tmp_path / "model.safetensors") == 2
    captured = capsys.readouterr()
    assert "holds no known LoRA" in captured.err and "old diffusers keys" in captured.out
    assert "rank 8 in 1 layer\n" in captured.out and "DoRA:                    no\n" in captured.out


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        ({"alpha": torch.ones(2)}, {}, "x.safetensors is broken"),
        ({}, {"modelspec.title": "\x1b[31m\nred"}, ""),
        ({}, {"moslora": "[]"}, ""),
        ({"dora_scale": torch.ones(2).to(torch.float8_e4m3fn)}, {}, ""),
    ],
)
def test_info_of_a_hostile_file_is_calm(tensors, header, message, tmp_path, capsys):
    pair = {"lora_down.weight": torch.ones(2, 3), "lora_up.weight": torch.ones(3, 2)}
    save_file(
        {f"lora_unet_x.{k}": t for k, t in (pair | tensors).items()},
        tmp_path / "x.safetensors",
        header,
    )
    assert run_main("info", tmp_path / "x.safetensors") == (2 if message else 0)
    captured = capsys.readouterr()
    assert (
        message in captured.err
        and captured.err.count("\n") <= 1
        and "\x1b" not in captured.out + captured.err
    )


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_black_picture_is_explained_as_on_the_page(tiny_base, state, tmp_path, capsys):
    save_file({key: value * 1e30 for key, value in state.items()}, tmp_path / "huge.safetensors")
    arguments = [
        "generate",
        "--base",
        tiny_base,
        "--prompt",
        "a dog",
        "--steps",
        "1",
        "--output_dir",
        tmp_path / "out",
    ]
    for adapter_flags, message in (
        (["--adapter", tmp_path / "huge.safetensors"], True),
        ([], False),
    ):
        assert run_main(*arguments, *adapter_flags) == 0
        black = (
            "note: of the images, 1 of them is black: "
            "an adapter's values or its scale are too large"
        )
        error = capsys.readouterr().err
        assert (black in error, "without --adapter the base generates alone" in error) == (
            message,
            not message,
        )
