"""What a person meets in the first hour: mistakes in paths and commands, told at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from dreambooth_moslora import __version__
from dreambooth_moslora.cli.main import main

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["diffusers"] = sys.modules["gradio"] = None  # to import them raises an error
from dreambooth_moslora.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
ABSENT = {
    "info x.safetensors": "there is no file x.safetensors",
    "generate --prompt dog --adapter x": "there is no adapter file x",
    "generate --prompt dog --base x": "the base x does not exist",
    "generate --prompt dog --from_png x.png": "x.png",
    "generate --prompt dog --basis x": "--basis x: there is no such file",
    "evaluate x": "there is no adapter file x",
    "evaluate dog.safetensors --photos x": "x: no such folder",
    "evaluate dog.safetensors --base x": "the base x does not exist",
    "export x --out y": "there is no file or folder x",
    "export x --for peft --out y": "there is no folder x",
    "explain x": "x holds no run",
    "verify x": "x: there is no such file",
    "check x": "x: no such folder",
    "check x dog": "x: there is no such folder",
    "caption x --subject dog": "x: no such folder",
    "doctor --photos x": "x: no such folder",
    "train x dog": "x: there is no such folder",
    "serve --adapters x": "--adapters x: there is no such folder",
    "serve --adapters . --pretrained_model_name_or_path x": "the base x does not exist",
    "app --base x": "the base x does not exist",
}


@pytest.mark.parametrize("words", ABSENT)
def test_a_path_that_is_not_there_is_told_before_torch_is_imported(words, tmp_path):
    """Its import takes half a minute on a busy machine."""
    (tmp_path / "dog.safetensors").write_bytes(b"")
    command = [sys.executable, "-c", WITHOUT_TORCH, *words.split()]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {ABSENT[words]}"), done.stderr
    assert done.stderr.count("\n") == 1


def test_the_version_and_a_mistyped_command(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    for name, said in (
        ("trian", "did you mean train?"),
        ("evalute", "did you mean evaluate?"),
        ("xyz", "choose one of"),
    ):
        assert main([name]) == 2
        assert capsys.readouterr().err.startswith(f"error: unknown command {name}: {said}")


def test_train_alone_shows_the_two_words_that_it_needs(capsys):
    assert main(["train"]) == 2
    said = (
        "error: say which photos to train, and what they show, as in `train photos/dog dog`; --help shows the flags.\n"
    )
    assert capsys.readouterr().err == said
