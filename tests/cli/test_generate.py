"""The `generate` command on the tiny base."""

import argparse
import json
import shutil

import numpy as np
import PIL.Image
import pytest

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.cli import command_generate
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.params import (
    GenerationParams,
    Image,
    Provenance,
    read_recipe,
)
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from tests.helpers.tiny_adapters import save_diffusers_lora


@pytest.fixture(scope="module")
def pipeline(tiny_base, tmp_path_factory):
    subject = SubjectPipeline.from_base(tiny_base)
    subject.load_adapter(
        save_diffusers_lora(subject.pipeline.unet, tmp_path_factory.mktemp("a") / "dog", seed=1)
    )
    return subject


def command(tiny_base, folder, *words) -> int:
    parser = argparse.ArgumentParser()
    command_generate.generate_arguments(parser)
    base = ["--base", str(tiny_base)] if tiny_base else []
    args = parser.parse_args([*base, "--output_dir", str(folder), "--steps", "2", *words])
    return command_generate.run_generate(args)


def test_the_base_is_that_of_the_first_adapters_run_also_where_it_is_the_embedded_one(
    tmp_path, capsys
):
    runs = [tmp_path / name for name in ("none", "toy", "an/other")]
    for run, base in zip(runs[1:], ("toy", "an/other")):
        run.mkdir(parents=True)
        RunDir(run).config_path.write_text(json.dumps({"pretrained_model_name_or_path": base}))
    for order, base in {(0,): "toy", (0, 1, 2): "toy", (2, 1): "an/other"}.items():
        assert command_generate.base_of_runs([str(runs[place]) for place in order]) == Base.find(
            base
        )
    assert capsys.readouterr().err.count("base: an/other, which the run in ") == 1
    (best := RunDir(runs[2]).best_dir / "x.safetensors").parent.mkdir()
    best.touch()
    for adapter in (f"{best}:0.5", str(best.parent)):
        assert command_generate.base_of_runs([adapter]) == Base.find("an/other")
    RunDir(runs[2]).config_path.write_text("{")
    with pytest.raises(UserError, match=r"is not valid JSON"):
        command_generate.base_of_runs([str(best)])
    assert command_generate.base_of_runs([str(best)], "a/given") == Base.find("a/given")


def test_the_command_writes_pictures_that_the_command_reads_again(
    tiny_base, pipeline, tmp_path, capsys
):
    adapter = save_diffusers_lora(pipeline.pipeline.unet, tmp_path / "runs" / "dog", seed=1).parent
    words = [
        "--adapter",
        f"{adapter}:0.5",
        "--prompt",
        "a sks dog",
        "--seed",
        "5",
        "--num_images",
        "2",
    ]
    assert command(tiny_base, tmp_path, *words) == 0
    first, second = (tmp_path / f"image_{seed}.png" for seed in (5, 6))
    assert capsys.readouterr().out.split() == [str(first), str(second)]
    assert read_recipe(second).params.adapters == (("dog", 0.5),)
    assert (
        command(tiny_base, tmp_path, "--adapter", f"{adapter}:0.5", "--from_png", str(second)) == 0
    )
    again = PIL.Image.open(tmp_path / "image_6_2.png")
    assert np.array_equal(np.asarray(again), np.asarray(PIL.Image.open(second)))
    with pytest.raises(UserError, match="--prompt"):
        command(tiny_base, tmp_path)


def test_the_base_is_loaded_from_where_the_run_had_it_unless_another_is_given(
    tiny_base, drawn, tmp_path, monkeypatch
):
    """The default revision was drawn with."""
    loaded, from_base = [], SubjectPipeline.from_base
    monkeypatch.setattr(
        SubjectPipeline, "from_base", lambda base: loaded.append(base) or from_base(base)
    )
    run = shutil.copytree(drawn / "runs" / "dog", tmp_path / "runs" / "dog")
    told = {"revision": "0" * 40, "cache_dir": str(tmp_path)}
    RunDir(run).config_path.write_text(
        json.dumps({"pretrained_model_name_or_path": str(tiny_base), **told})
    )
    monkeypatch.chdir(tmp_path)
    for base, words in (
        (None, ["--adapter", str(run), "--prompt", "dog"]),
        (None, []),
        (tiny_base, []),
    ):
        command(base, tmp_path, *(words or ["--from_png", str(drawn / "image_0.png")]))
    assert loaded == [Base.find(tiny_base, **own) for own in (told, told, {})]


@pytest.fixture(scope="module")
def drawn(tiny_base, pipeline, tmp_path_factory):
    """A folder with `runs/dog` and the picture that it drew at scale 0.6."""
    folder = tmp_path_factory.mktemp("drawn")
    adapter = save_diffusers_lora(pipeline.pipeline.unet, folder / "runs" / "dog", seed=1).parent
    assert command(tiny_base, folder, "--adapter", f"{adapter}:0.6", "--prompt", "a sks dog") == 0
    return folder


def is_drawn_again(tiny_base, drawn, folder, *words) -> bool:
    first = drawn / "image_0.png"
    assert command(tiny_base, folder, "--from_png", str(first), *words) == 0
    return np.array_equal(
        np.asarray(PIL.Image.open(folder / "image_0.png")), np.asarray(PIL.Image.open(first))
    )


@pytest.mark.parametrize("given", ["dog --adapter runs/dog", "dog", "rex"])
def test_a_picture_is_drawn_again_at_its_own_scale_under_whatever_name(
    given, tiny_base, drawn, tmp_path, monkeypatch, capsys
):
    """Its adapter is found by its content."""
    name, *words = given.split()
    shutil.copytree(drawn / "runs" / "dog", tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    assert is_drawn_again(tiny_base, drawn, tmp_path, *words)
    assert "note" not in capsys.readouterr().err


def test_a_picture_is_drawn_again_with_the_base_of_its_adapters_run(
    tiny_base, drawn, tmp_path, monkeypatch, capsys
):
    """The embedded base was taken. Where it is taken, a picture of another base says so."""
    shutil.copytree(drawn / "runs", tmp_path / "runs")
    file = RunDir(tmp_path / "runs" / "dog").config_path
    file.write_text(json.dumps({"pretrained_model_name_or_path": str(tiny_base)}))
    monkeypatch.chdir(tmp_path)
    assert is_drawn_again(None, drawn, tmp_path)
    assert "note" not in capsys.readouterr().err
    image = Image(
        0, PIL.Image.new("RGB", (8, 8)), GenerationParams("dog", steps=1), Provenance("some/base")
    )
    assert command(tiny_base, tmp_path, "--from_png", str(image.save(tmp_path / "a.png"))) == 0
    said = f"note: the picture was made with the base some/base, and this is {tiny_base.name}\n"
    assert said in capsys.readouterr().err


def test_the_line_says_which_adapter_of_a_picture_is_not_here(
    tiny_base, drawn, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"the picture's adapter 'dog' \(sha256 \w{12}\) is not in runs/.*--adapter"
    ):
        command(tiny_base, tmp_path, "--from_png", str(drawn / "image_0.png"))
