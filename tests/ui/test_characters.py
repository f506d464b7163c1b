"""What is not a character (JSON can hold a lone surrogate) is refused in words wherever a visitor can put it."""

import json
from pathlib import Path

import gradio as gr
import numpy as np
import PIL.Image
import pytest
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from dreambooth_moslora.core import UserError
from dreambooth_moslora.generation.params import GenerationParams, read_recipe
from dreambooth_moslora.ui.generate_form import summary_of
from dreambooth_moslora.ui.html import facts_table, notice
from dreambooth_moslora.ui.state import as_gradio_error
from dreambooth_moslora.ui.train_form import TrainForm

HALF = "a \ud800"


@pytest.mark.parametrize(
    "make",
    [
        lambda: GenerationParams(HALF),
        lambda: GenerationParams("a dog", negative_prompt=HALF),
        lambda: TrainForm(HALF, "dog").config("toy", 128, Path("p"), Path("r")),
        lambda: TrainForm("sks", HALF).config("toy", 128, Path("p"), Path("r")),
        lambda: TrainForm("sks", "dog", captions=f"x\n{HALF}").config("toy", 128, Path("p"), Path("r")),
    ],
)
def test_half_a_character_is_refused_in_words(make):
    with pytest.raises(UserError, match="is not a character") as told:
        make()
    assert str(told.value).encode()


@pytest.mark.parametrize("name", ["prompt", "adapters", "adapter_sha256"])
def test_half_a_character_in_a_recipe_makes_it_damaged(tmp_path, name):
    recipe = json.loads(GenerationParams("a dog", adapters=(("dog", 1.0),)).to_png_text()["dreambooth_moslora"])
    recipe["params"] |= {"prompt": HALF} if name == "prompt" else {"adapters": [[HALF, 1.0]]}
    if name == "adapter_sha256":
        recipe["params"]["adapters"], recipe[name] = [], {HALF: "x"}
    text = PngInfo()
    text.add_text("dreambooth_moslora", json.dumps(recipe))
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=text)
    with pytest.raises(UserError, match="damaged"):
        read_recipe(tmp_path / "a.png")


def test_what_the_page_quotes_can_be_sent(tmp_path):
    file = tmp_path / "a.safetensors"
    facts = json.dumps({"trigger_words": [HALF], "class_word": "dog"})
    save_file({"x": np.zeros(1, np.float32)}, file, metadata={"moslora": facts})

    def fail() -> None:
        raise UserError(HALF)

    with pytest.raises(gr.Error) as told:
        as_gradio_error(fail)()
    for made in (notice(HALF), facts_table([(HALF, HALF)]), told.value.message):
        assert made.encode()
    assert summary_of(file).subject.encode()
