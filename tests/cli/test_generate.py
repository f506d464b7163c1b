"""The `generate` command on the tiny base."""

import argparse
import json

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.cli import command_generate
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.image_params import (
    read_recipe,
)
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.lora.metadata import AdapterMetadata
from tests.helpers.tiny import tiny_sdxl
from tests.helpers.tiny_adapters import save_diffusers_lora


@pytest.fixture(scope="module")
def pipeline(tiny_base, tmp_path_factory):
    subject = SubjectPipeline.from_base(tiny_base)
    subject.load_adapter(
        save_diffusers_lora(subject.pipeline.unet, tmp_path_factory.mktemp("a") / "dog", seed=1)
    )
    return subject


def run_generate(tiny_base, folder, *flags) -> int:
    parser = argparse.ArgumentParser()
    command_generate.generate_arguments(parser)
    base = ["--base", str(tiny_base)] if tiny_base else []
    args = parser.parse_args([*base, "--output_dir", str(folder), "--steps", "2", *flags])
    return command_generate.run_generate(args)


def test_base_is_that_of_the_first_adapter(tmp_path, capsys):
    runs = [tmp_path / name for name in ("none", "toy", "an/other")]
    for run, base in zip(runs[1:], ("toy", "an/other")):
        run.mkdir(parents=True)
        RunDir(run).config_path.write_text(json.dumps({"pretrained_model_name_or_path": base}))
    for order, base in {(0,): "toy", (0, 1, 2): "toy", (2, 1): "an/other"}.items():
        assert command_generate.find_runs_base([str(runs[place]) for place in order]) == Base.find(
            base
        )
    assert capsys.readouterr().err.count("base: an/other, which the run in ") == 1
    (best := RunDir(runs[2]).best_dir / "x.safetensors").parent.mkdir()
    best.touch()
    for adapter in (f"{best}:0.5", str(best.parent)):
        assert command_generate.find_runs_base([adapter]) == Base.find("an/other")
    RunDir(runs[2]).config_path.write_text("{")
    with pytest.raises(UserError, match=r"is not valid JSON"):
        command_generate.find_runs_base([str(best)])
    assert command_generate.find_runs_base([str(best)], "a/given") == Base.find("a/given")


def test_prompt_without_the_trigger_words_is_remarked_on(tmp_path):
    """The base's own rockets were drawn, without a word."""
    metadata = AdapterMetadata(rank=1, alpha=1, trigger_words=("sks rocket",))
    file = tmp_path / "rocket.safetensors"
    save_file({"a": torch.zeros(1)}, file, metadata=metadata.header)
    list_lines = command_generate.list_missing_triggers
    assert list_lines([f"{file}:0.5"], "a photo of a SKS rocket on the moon") == []
    (line,) = list_lines([f"{file}:0.5"], "a photo of a rocket")
    assert "“sks rocket”, which the prompt lacks" in line


def test_the_command_writes_pictures_with_their_recipe(tiny_base, pipeline, tmp_path, capsys):
    adapter = save_diffusers_lora(pipeline.pipeline.unet, tmp_path / "runs" / "dog", seed=1).parent
    flags = [
        "--adapter",
        f"{adapter}:0.5",
        "--prompt",
        "a sks dog",
        "--seed",
        "5",
        "--num_images",
        "2",
    ]
    assert run_generate(tiny_base, tmp_path, *flags) == 0
    first, second = (tmp_path / f"image_{seed}.png" for seed in (5, 6))
    assert capsys.readouterr().out.split() == [str(first), str(second)]
    assert read_recipe(second).params.adapters == (("dog", 0.5),)
    assert run_generate(tiny_base, tmp_path, *flags[:4], "--seed", "6") == 0
    again = PIL.Image.open(tmp_path / "image_6_2.png")
    assert np.array_equal(np.asarray(again), np.asarray(PIL.Image.open(second)))


def test_base_is_loaded_from_where_the_run_had_it(tiny_base, pipeline, tmp_path, monkeypatch):
    """The default revision was drawn with."""
    loaded, from_base = [], SubjectPipeline.from_base
    monkeypatch.setattr(
        SubjectPipeline, "from_base", lambda base: loaded.append(base) or from_base(base)
    )
    run = save_diffusers_lora(pipeline.pipeline.unet, tmp_path / "runs" / "dog", seed=1).parent
    base_settings = {"revision": "0" * 40, "cache_dir": str(tmp_path)}
    RunDir(run).config_path.write_text(
        json.dumps({"pretrained_model_name_or_path": str(tiny_base), **base_settings})
    )
    for base in (None, tiny_base):
        run_generate(base, tmp_path, "--adapter", str(run), "--prompt", "dog")
    assert loaded == [Base.find(tiny_base, **settings) for settings in (base_settings, {})]


def test_vae_that_overflows_in_fp16_decodes_in_fp32(tmp_path, monkeypatch):
    """Its configuration does not tell diffusers to upcast it. The pictures were black."""
    base = tmp_path / "base"
    overflowing = tiny_sdxl(tmp_path)
    with torch.no_grad():
        overflowing.vae.decoder.conv_in.weight.mul_(3e5)
    overflowing.vae.register_to_config(force_upcast=False)
    overflowing.save_pretrained(base)

    # On a CPU the command would load it in fp32.
    from_base = SubjectPipeline.from_base
    pictures = []
    for dtype in (torch.float16, torch.float32):
        monkeypatch.setattr(
            SubjectPipeline, "from_base", lambda base, dtype=dtype: from_base(base, dtype)
        )
        folder = tmp_path / str(dtype)
        assert run_generate(base, folder, "--prompt", "a dog", "--seed", "5") == 0
        pictures.append(np.asarray(PIL.Image.open(folder / "image_5.png"), int))
    half, full = pictures
    assert full.std() > 1 and np.abs(half - full).max() <= 8
