"""GenerationParams: limits, tags, and the way through a PNG and back."""

import json
import zlib

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.image_params import (
    GenerationParams,
    Provenance,
    parse_lora_tags,
    read_recipe,
    resolve_seed,
)
from tests.helpers.odd_photos import jpeg, png_of

SIZES = {
    "seed": 4294967295,
    "steps": 7,
    "guidance_scale": 3.25,
    "height_px": 64,
    "width_px": 128,
    "num_images": 1,
}
FULL = GenerationParams(
    prompt='a photo of a "sks" mug, <b>bold</b>\nNegative prompt: not really, Steps: 3',
    negative_prompt="blur, Seed: 12",
    adapters=(("mug", 0.8), ("style", -0.5)),
    scheduler="unipc",
    **SIZES,
)
FACTS = Provenance("toy", (("mug", "ab" * 32),), (("dreambooth_moslora", "0.1.0"),))


def write_png(path, text: dict[str, str]):
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_a_png_gives_back_its_parameters(tmp_path):
    """Its text names no path."""
    text = FULL.to_png_text(FACTS)
    recipe = read_recipe(write_png(tmp_path / "a.png", text))
    assert recipe.params == FULL and recipe.provenance == FACTS
    assert "/" not in json.dumps(text).replace("</b>", "")


def test_text_options_are_in_the_recipe_only_if_they_are_set(tmp_path):
    params = GenerationParams(
        "a mug", text_options={"max_sequence_length": "64", "text_encoder_out_layers": ["9", "18"]}
    )
    assert dict(params.text_options) == {
        "max_sequence_length": 64,
        "text_encoder_out_layers": ("9", "18"),
    }
    assert read_recipe(write_png(tmp_path / "a.png", params.to_png_text(FACTS))).params == params
    assert "text_options" not in FULL.to_dict()


WRONG = [
    ({"prompt": "  "}, "empty"),
    ({"prompt": 3}, "text"),
    ({"prompt": "x" * 5001}, "5001"),
    ({"steps": 0}, "steps"),
    ({"steps": True}, "steps"),
    ({"seed": -1}, "seed"),
    ({"guidance_scale": float("nan")}, "guidance_scale"),
    ({"num_images": 65}, "num_images"),
    ({"height_px": 100}, "multiple of 8"),
    ({"width_px": 8192}, "width_px"),
    ({"scheduler": "magic"}, "magic"),
    ({"adapters": [("a", 99)]}, "99"),
    ({"adapters": [("a", float("nan"))]}, "nan"),
    ({"adapters": 5}, "pairs"),
    ({"adapters": [("a", 10**400)]}, "pairs of name and scale"),
    ({"adapters": [("a", 1), ("a", 2)]}, "twice"),
    ({"text_options": "abc"}, "names with values"),
    ({"text_options": {"clip": 1}}, "clip"),
    ({"text_options": {"max_sequence_length": 0}}, "1"),
    ({"surprise": 1}, "surprise"),
]


@pytest.mark.parametrize("values, word", WRONG)
def test_a_value_out_of_range_is_refused_in_one_line(values, word):
    with pytest.raises(UserError) as error:
        GenerationParams.from_dict({"prompt": "a mug"} | values)
    assert word in str(error.value) and "\n" not in str(error.value)


def text_bomb() -> bytes:
    return png_of(
        8, 8, b"", (b"zTXt", b"dreambooth_moslora\0\0" + zlib.compress(b" " * 200_000_000, 9))
    )


ODD = {
    "a list": ("[]", "damaged"),
    "half of JSON": ("{", "damaged"),
    "a list of parameters": ('{"params": []}', "damaged"),
    "a prompt of no text": ('{"params": {"prompt": {}}}', "prompt must be text"),
    "versions of no names": ('{"params": {"prompt": "a"}, "versions": 3}', "damaged"),
    "nested": ("[" * 100_000, "damaged"),
    "bare": ({}, "no recipe"),
    "text": (b"hello", "PNG"),
    "nothing": (None, "no such file"),
    "photo": (jpeg, "PNG"),
    "pixel bomb": (png_of(100_000, 100_000, b""), "PNG"),
    "text bomb": (text_bomb, "PNG"),
}


@pytest.mark.parametrize("name", ODD)
def test_a_file_without_a_recipe_is_refused(name, tmp_path):
    (content, word), file = ODD[name], tmp_path / "a.png"
    content = content() if callable(content) else content
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        write_png(file, {"dreambooth_moslora": content} if content else {})
    with pytest.raises(UserError, match=word):
        read_recipe(file)


@pytest.mark.parametrize("adapters", ["rex", ["rex"], (("rex", 1.0),), [["rex", 1]]])
def test_an_adapter_is_given_by_its_name_or_with_a_scale(adapters):
    assert GenerationParams("dog", adapters=adapters).adapters == (("rex", 1.0),)


def test_tags_become_adapters_and_leave_the_prompt():
    parsed = parse_lora_tags("a dog <lora:rex:0.8> in snow <lora:style>")
    assert parsed == ("a dog in snow", (("rex", 0.8), ("style", 1.0)))
    assert parse_lora_tags("a  dog") == ("a  dog", ())
    written = "<lora:a:.5> <lora:b: 0.5> <lora:c:+1>"
    assert parse_lora_tags(written) == ("", (("a", 0.5), ("b", 0.5), ("c", 1.0)))
    for tag in ("<lora:rex:0.8:0.5>", "<lora:rex:high>", "<lora:rex:>"):
        with pytest.raises(UserError, match=f"{tag} cannot be read: write <lora:NAME:SCALE>"):
            parse_lora_tags(f"a dog {tag}")
    params = GenerationParams(
        "dog <lora:rex:0.5>", adapters=(("rex", 1.0), ("b", 0.2))
    ).apply_tags()
    assert params.prompt == "dog" and params.adapters == (("rex", 0.5), ("b", 0.2))
    with pytest.raises(UserError, match="empty"):
        GenerationParams("<lora:rex>").apply_tags()
    images = [GenerationParams("dog", seed=4294967295, num_images=3).for_image(i) for i in range(2)]
    assert [(p.seed, p.num_images) for p in images] == [(4294967295, 1), (0, 1)]
    assert resolve_seed(7) == 7 and len({resolve_seed(-1) for _ in range(8)}) > 1
