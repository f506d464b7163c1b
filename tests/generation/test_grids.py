"""Grids and the `generate` command on the tiny base."""

import argparse
import json
import shutil
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.cli import command_generate
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.grids import (
    Axis,
    Sheet,
    cells_of,
    draw_sheet,
    generate_grid,
    parse_axis,
)
from dreambooth_moslora.generation.params import (
    GenerationParams,
    Image,
    Provenance,
    Step,
    read_recipe,
)
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from tests.helpers.tiny_adapters import save_diffusers_lora

PARAMS = GenerationParams(
    "a photo of a sks dog", seed=3, steps=2, guidance_scale=4.0, adapters=(("dog", 1.0),)
)


@pytest.fixture(scope="module")
def pipeline(tiny_base, tmp_path_factory):
    subject = SubjectPipeline.from_base(tiny_base)
    subject.load_adapter(
        save_diffusers_lora(subject.pipeline.unet, tmp_path_factory.mktemp("a") / "dog", seed=1)
    )
    return subject


def test_cells_are_where_the_sheet_says(pipeline):
    """A stopped grid has no sheet."""
    events = list(
        generate_grid(pipeline, PARAMS, (Axis("scale", (0.0, 1.0)), Axis("seed", (1, 2, 3))))
    )
    images, steps = ([e for e in events if isinstance(e, kind)] for kind in (Image, Step))
    sheet = events[-1]
    assert isinstance(sheet, Sheet) and [e.index for e in images] == list(range(6))
    assert [(e.params.adapters[0][1], e.params.seed) for e in images][3] == (1.0, 1)
    assert steps[0].num_images == 6 and steps[-1].eta_sec == 0
    (alone,) = pipeline.draw(replace(PARAMS, seed=2, adapters=(("dog", 0.0),)))
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(sheet.pixels), (64, 64, 3))[
        :, :, 0
    ]
    assert (windows == np.asarray(alone.pixels)).all((2, 3, 4)).sum() == 1
    stopped = generate_grid(pipeline, PARAMS, (Axis("seed", (1, 2)),), should_stop=lambda: True)
    assert not any(isinstance(e, Sheet | Image) for e in stopped)


def test_a_grid_may_have_more_adapters_than_the_model_holds_and_its_sheet_names_them(
    tiny_base, tmp_path, monkeypatch
):
    monkeypatch.setattr("dreambooth_moslora.generation.pipeline.RESIDENT_ADAPTERS", 1)
    subject = SubjectPipeline.from_base(tiny_base)
    names = ("dog", "cat")
    files = {
        n: save_diffusers_lora(subject.pipeline.unet, tmp_path / n, seed=i)
        for i, n in enumerate(names)
    }
    hashes = {}

    def load(cell):
        for name, _ in cell.adapters:
            subject.load_adapter(files[name], name)
            hashes[name] = subject.adapters[name].sha256
        return cell

    events = list(generate_grid(subject, PARAMS, (Axis("adapter", names),), load=load))
    first, second = (np.asarray(event.pixels) for event in events if isinstance(event, Image))
    assert not np.array_equal(first, second)
    recipe = read_recipe(events[-1].save(tmp_path / "sheet.png"))
    assert dict(recipe.provenance.adapter_sha256) == hashes and len(hashes) == 2
    assert recipe.provenance.base == subject.base_name and recipe.provenance.versions


def test_axes_are_parsed_and_applied_and_long_captions_stay_inside_their_column():
    assert [Axis("scale", (0.0, 0.5)).label(i) for i in range(2)] == ["scale 0", "scale 0.5"]
    assert parse_axis("scale=0, 0.5,1") == Axis("scale", (0.0, 0.5, 1.0))
    assert parse_axis("prompt=a mug, red|b") == Axis("prompt", ("a mug, red", "b"))
    cells = cells_of(PARAMS, (Axis("adapter", ("cat", "none")), Axis("guidance", (1.0, 7.0))))
    assert [c.adapters for c in cells[0]] == [(("cat", 1.0),)] * 2 and cells[1][1].adapters == ()
    assert cells[1][1].guidance_scale == 7.0
    picture = PIL.Image.new("RGB", (64, 64), "red")
    sheet = draw_sheet([[picture, picture]], ["row " * 50], ["x " * 200, "short"])
    assert sheet.width < 4 * 64 + 60 and np.asarray(sheet)[:, -12:].min() == 255


def test_adapters_on_an_axis_take_turns_each_at_its_own_scale_beside_those_that_are_not_on_it():
    """The second was drawn in all cells too, and at the first's scale in its own."""
    params = replace(PARAMS, adapters=(("dog", 0.9), ("cat", 0.05), ("ink", 0.3)))
    turns, ink = Axis("adapter", ("dog", "cat", "none")), ("ink", 0.3)
    found = [cell.adapters for (cell,) in cells_of(params, (turns,))]
    assert found == [(("dog", 0.9), ink), (("cat", 0.05), ink), (ink,)]
    for axes in ((turns, Axis("scale", (0.5,))), (Axis("scale", (0.5,)), turns)):
        cells = [cell.adapters for row in cells_of(params, axes) for cell in row]
        assert cells[:2] == [(("dog", 0.5), ink), (("cat", 0.5), ink)]


BAD = [
    ("colour=1", "colour"),
    ("scale", "scale"),
    ("seed=", "no values"),
    ("seed=a", "not a number"),
]
BAD += [("seed=1.5", "number"), ((PARAMS, (Axis("seed", tuple(range(65))),)), "cells")]
BAD += [((PARAMS, (Axis("seed", (1,)), Axis("seed", (2,)))), "different")]
BAD += [((GenerationParams("a"), (Axis("scale", (1.0,)),)), "needs an adapter")]


@pytest.mark.parametrize("text, word", BAD)
def test_a_bad_axis_and_an_impossible_grid_are_refused(text, word):
    with pytest.raises(UserError, match=word):
        parse_axis(text) if isinstance(text, str) else cells_of(*text)


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


def test_the_command_writes_pictures_and_a_grid_that_the_command_reads_again(
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
    words = ["--adapter", str(adapter), "--prompt", "dog", "--grid", "scale=0,1", "seed=1,2"]
    assert command(tiny_base, tmp_path / "grid", *words) == 0
    assert [p.name for p in (tmp_path / "grid").glob("*.png")] == ["grid.png"]
    assert read_recipe(tmp_path / "grid" / "grid.png").params.prompt == "dog"
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
