"""The command `caption`."""

import shutil

import pytest

from dreambooth_moslora.cli.main import main
from tests.cli.test_check import ROOT

TOY = ["--pretrained_model_name_or_path", "toy"]


@pytest.fixture
def duck(tmp_path, monkeypatch):
    """Two photos; the second has a caption."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "duck").mkdir()
    for name in ("01.jpg", "03.jpg", "03.txt"):
        shutil.copy(ROOT / "assets" / "subjects" / "duck" / name, tmp_path / "duck" / name)
    return tmp_path / "duck"


def test_photos_get_captions_that_say_the_place_behind_the_subject(duck, capsys):
    own = (duck / "03.txt").read_bytes()
    assert main(["caption", "duck", "--subject", "sks duck", *TOY]) == 0
    assert (duck / "01.txt").read_text() == "a photo of a sks duck on a wooden floor\n"
    assert (duck / "03.txt").read_bytes() == own
    out = capsys.readouterr().out
    assert "03.jpg  it has a caption, which is kept" in out and out.endswith("2 photos, 1 captions written\n")
    assert main(["caption", "duck", "--instance_prompt", "photo of ohwx duck", "--overwrite_made", *TOY]) == 0
    assert (duck / "01.txt").read_text() == "photo of ohwx duck on a wooden floor\n"
    assert main(["check", "duck", "--no_picture", "--resolution", "128", *TOY]) == 0
    assert "“photo of ohwx duck on a wooden floor”" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["duck"], "--subject --instance_prompt is required"),
        (["duck", "--subject", "   ", *TOY], "--subject: it has no words"),
        (["duck", "--instance_prompt", "\t", *TOY], "--instance_prompt: it has no words"),
        (["duck", "--subject", "sks"], "no word says what the photos show"),
        (["nowhere", "--subject", "sks duck"], "no such folder"),
        (["duck", "--subject", "sks duck"], "--caption_model Qwen/Qwen3-VL-2B-Instruct is not here"),
        (["duck", "--subject", "sks duck", "--caption_model", "/nowhere"], "--caption_model /nowhere is not here"),
    ],
)
def test_mistakes_exit_2_with_one_line(duck, arguments, says, capsys):
    assert main(["caption", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
