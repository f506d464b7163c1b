"""Settings from a picture: what the form then holds is what Generate takes, and every change is remarked."""

import json
from dataclasses import replace

import gradio as gr
import PIL.Image
import pytest
from PIL.PngImagePlugin import PngInfo

from dreambooth_moslora.core import UserError
from dreambooth_moslora.generation.params import GenerationParams, check_size, read_recipe
from dreambooth_moslora.ui.generate import ask_widgets, settings_widgets
from dreambooth_moslora.ui.generate_form import RANGES, GenerateForm, clamp_to_widgets, match_adapters, recipe_of
from dreambooth_moslora.ui.state import as_gradio_error
from tests.ui.test_handlers import context


@pytest.mark.parametrize(
    "params, words",
    [
        (GenerationParams("a", steps=200), ["the number of steps 200 is beyond what the page offers; 100 is set"]),
        (GenerationParams("a", guidance_scale=50.0), ["guidance 50 is beyond what the page offers; 30 is set"]),
        (GenerationParams("a", adapters=(("x", -10), ("y", 10))), ["scale of x: -10", "scale of y: 10"]),
        (GenerationParams("a", height_px=1024, width_px=1024), ["1024 x 1024 px is too large"]),
        (GenerationParams("a", steps=100, guidance_scale=0.0, adapters=(("x", -2.0),), height_px=64, width_px=64), []),
    ],
)
def test_settings_beyond_the_page_become_the_nearest_with_a_remark(tmp_path, params, words):
    found, remarks = clamp_to_widgets(params, 64, 4.0)
    assert len(remarks) == len(words) and all(word in remark for word, remark in zip(words, remarks))
    assert replace(found, guidance_scale=params.guidance_scale) == params or words
    assert found.guidance_scale == (4.0 if params.guidance_scale is None else min(params.guidance_scale, 30))
    ctx = context(tmp_path)
    with gr.Blocks():
        widgets = ask_widgets(ctx)[0] | settings_widgets(ctx)
    form = GenerateForm.from_params(found)
    taken = {name: widgets[name].preprocess(getattr(form, name)) for name in widgets}
    check_size(GenerateForm.of(taken).params(), 64)
    assert {widgets[name].maximum for name in RANGES} == {high for _, high in RANGES.values()}
    ctx.visitors.close()


@pytest.mark.parametrize(
    "sampler, ours, remark",
    [
        ("Euler a", "euler", "the sampler Euler a is not available; Euler replaces it"),
        ("DPM++ 2M, Schedule type: Karras", "dpmpp_2m_karras", ""),
        ("DPM++ 2M, Schedule type: Automatic", "dpmpp_2m_karras", ""),
        ("Euler, Schedule type: Automatic", "euler", ""),
        ("Euler, Schedule type: Beta", "euler", "the sampler Euler Beta is not available; Euler replaces it"),
    ],
)
def test_a_sampler_that_is_not_here_is_remarked(tmp_path, sampler, ours, remark):
    text = PngInfo()
    text.add_text("parameters", f"a hen\nSteps: 4, Sampler: {sampler}, CFG scale: 5, Seed: 1")
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=text)
    params, remarks = match_adapters(read_recipe(tmp_path / "a.png"), {}, "toy")
    assert params.scheduler == ours and remarks == ([remark] if remark else [])


ODD_RECIPES = {
    "an endless scale": {"prompt": "a dog", "adapters": [["a", 10**400]]},
    "an endless name": {"prompt": "a dog", "x" * 3_000_000: 1},
    "an endless number": {"prompt": "a dog", "steps": 10**400},
    "an endless scheduler": {"prompt": "a dog", "scheduler": "x" * 3_000_000},
    "a list for a scheduler": {"prompt": "a dog", "scheduler": []},
}


@pytest.mark.parametrize("kind", ODD_RECIPES)
def test_a_recipe_with_endless_or_odd_values_is_refused_in_a_short_line(tmp_path, kind):
    info = PngInfo()
    info.add_text("dreambooth_moslora", json.dumps({"params": ODD_RECIPES[kind]}), zip=True)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(gr.Error) as told:
        as_gradio_error(recipe_of)(tmp_path / "a.png")
    assert len(told.value.message) < 400 and "server's log" not in told.value.message


@pytest.mark.parametrize("scheduler", [[], ["euler"], {}, 5, None])
def test_a_scheduler_that_is_no_word_is_told(scheduler):
    with pytest.raises(UserError, match="scheduler"):
        GenerateForm("a dog", scheduler=scheduler).params()


@pytest.mark.parametrize("adapter", [["dog"], {"a": 1}, 5])
def test_an_adapter_that_is_no_word_is_told(adapter):
    with pytest.raises(UserError, match="adapter"):
        GenerateForm("a dog", adapter=adapter).params()
