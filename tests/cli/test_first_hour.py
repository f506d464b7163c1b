"""What a person meets in the first hour: mistakes in paths and commands, told at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RunDir

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["diffusers"] = sys.modules["gradio"] = None  # to import them raises an error
from dreambooth_moslora.cli.main import main
print([main(words.split()) for words in sys.argv[1:]])
"""
ABSENT = {
    "info x.safetensors": "there is no file x.safetensors",
    "generate --prompt dog --adapter x": "there is no adapter file x",
    "generate --prompt dog --base x": "the base x does not exist",
    "generate --prompt dog --adapter run:0.5": "the base ./gone does not exist",  # that of the run's settings
    "generate --prompt dog --adapter run/best": "the base ./gone does not exist",
    "generate --prompt dog --from_png x.png": "x.png",
    "generate --prompt dog --basis x": "--basis x: there is no such file",
    "evaluate x": "there is no adapter file x",
    "evaluate dog.safetensors --photos x": "x: no such folder",
    "evaluate dog.safetensors --base x": "the base x does not exist",
    "export x --out y": "there is no file or folder x",
    "export x --for peft --out y": "there is no folder x",
    "explain x": "x holds no run",
    "verify x": "x: there is no such file",
    "verify dog.safetensors --photos x": "x: no such folder",
    "verify dog.safetensors --config x.toml": "--config x.toml: there is no such file",
    "verify dog.safetensors --pretrained_model_name_or_path x": "the base x does not exist",
    "check x": "x: no such folder",
    "check x dog": "x: there is no such folder",
    "caption x --subject dog": "x: no such folder",
    "doctor --photos x": "x: no such folder",
    "train x dog": "x: there is no such folder",
    "train photos dog --pretrained_model_name_or_path x": "the base x does not exist",
    "train --config x.toml": "--config x.toml: there is no such file",
    "train photos dog --like x": "--like x: there is no such file",
    "compare x dog": "x: there is no such folder",
    "compare --config x.toml": "--config x.toml: there is no such file",
    "basis x --out basis.safetensors": "x: there is no such folder",
    "fleet x --out y --pretrained_model_name_or_path toy": "x: give a folder of subject folders",
    "fleet status x": "{here}/x holds no fleet",
    "queue remove x": "no run called 'x' waits",
    "evaluate dog.safetensors --output_dir dog.safetensors": "--output_dir dog.safetensors",
    "serve --adapters x": "--adapters x: there is no such folder",
    "serve --adapters . --pretrained_model_name_or_path x": "the base x does not exist",
    "app --base x": "the base x does not exist",
    "app --bases_dir x": "--bases_dir x is not a folder",
    "app --runs_dir dog.safetensors": "--runs_dir dog.safetensors cannot be a folder",
    "generate --prompt dog --adapter ~nobody_/x": "there is no adapter file ~nobody_/x",
    "export ~nobody_/x --out y": "there is no file or folder ~nobody_/x",
    "verify ~nobody_/x": "~nobody_/x: there is no such file",
    "app --base ~nobody_/x": "the base ~nobody_/x does not exist",
}


def test_a_path_that_is_not_there_is_told_before_torch_is_imported(tmp_path):
    """Its import takes half a minute on a busy machine."""
    (tmp_path / "dog.safetensors").write_bytes(b"")
    (tmp_path / "photos").mkdir()
    for folder in (tmp_path / "run", tmp_path / "run" / "best"):
        folder.mkdir()
        (folder / PUBLISHED_NAME).write_bytes(b"")
    RunDir(tmp_path / "run").config_path.write_text('{"pretrained_model_name_or_path": "./gone"}')
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", WITHOUT_TORCH, *ABSENT]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{[2] * len(ABSENT)}\n", done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("base: ./gone, which the run in ")]
    for line, said in zip(errors, ABSENT.values(), strict=True):
        assert line.startswith(f"error: {said.format(here=tmp_path)}")


@pytest.mark.parametrize(
    "words, said",
    [
        ("trian", "unknown command trian: did you mean train?"),
        ("xyz", "unknown command xyz: choose one of"),
        ("check", "the following arguments are required"),
        (
            "train",
            "say which photos to train, and what they show, as in `train photos/dog dog`; --help shows the flags.\n",
        ),
    ],
)
def test_a_mistyped_or_unfinished_command_is_one_line(words, said, capsys):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1


@pytest.mark.parametrize("command", ["check", "compare"])
@pytest.mark.parametrize(
    ("flag", "said"),
    [("--flag=a b", "unknown flag --flag; see"), ("-x y", "unknown flag -x y"), ("--rnak=4 5", "--rank?")],
)
def test_a_flag_that_is_none_is_no_word_of_the_subject(command, flag, said, tmp_path, capsys):
    assert main([command, str(tmp_path), flag]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_words_that_an_ascii_python_cannot_read_are_told_with_the_cure(tmp_path):
    """By LC_ALL=C and PYTHONUTF8=0; they were said to be no UTF-8, which they are."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "dreambooth_moslora", "train", "--instance_prompt", "a photo of a sks 犬"]
    done = subprocess.run(command, cwd=tmp_path, env=plain, capture_output=True)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert done.stderr.endswith(b": Python reads words and names as ascii here; set PYTHONUTF8=1.\n")
