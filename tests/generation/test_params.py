"""GenerationParams: limits, tags, and the way through a PNG and back."""

import json
import time
import zlib

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dreambooth_moslora.core import UserError
from dreambooth_moslora.generation.params import GenerationParams, Provenance, draw_seed, read_recipe, split_lora_tags
from tests.helpers.odd_photos import jpeg, png_of

SIZES = {"seed": 4294967295, "steps": 7, "guidance_scale": 3.25, "height_px": 64, "width_px": 128, "num_images": 1}
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


def test_a_png_gives_back_exactly_what_was_written(tmp_path):
    """And names no path."""
    text = FULL.to_png_text(FACTS)
    recipe = read_recipe(write_png(tmp_path / "a.png", text))
    assert recipe.params == FULL and recipe.provenance == FACTS and recipe.exact
    assert "/" not in json.dumps(text).replace("</b>", "")


def test_text_options_come_back_and_are_not_in_the_recipe_of_a_picture_without_them(tmp_path):
    params = GenerationParams(
        "a mug", text_options={"max_sequence_length": "64", "text_encoder_out_layers": ["9", "18"]}
    )
    assert dict(params.text_options) == {"max_sequence_length": 64, "text_encoder_out_layers": ("9", "18")}
    assert read_recipe(write_png(tmp_path / "a.png", params.to_png_text(FACTS))).params == params
    assert "text_options" not in FULL.to_dict()


def test_the_a1111_text_is_read_by_itself_and_so_is_that_of_another_program(tmp_path):
    params = GenerationParams("a red mug", "blur, dark", 12, 20, 6.5, 64, 128, adapters=(("mug", 0.8),))
    text = params.to_png_text(FACTS)["parameters"]
    recipe = read_recipe(write_png(tmp_path / "a.png", {"parameters": text}))
    assert recipe.params == params and not recipe.exact
    text = (
        "portrait of a dog <lora:rex:0.7>\nNegative prompt: cat\nSteps: 30, Sampler: DPM++ 2M, Schedule type: Karras, "
        'CFG scale: 7, Seed: 99, Size: 832x1216, Model hash: 31e35c80fc, Lora hashes: "rex: 1234", Version: v1.10.0'
    )
    params = GenerationParams.from_png(write_png(tmp_path / "a.png", {"parameters": text}))
    assert (params.prompt, params.negative_prompt, params.scheduler) == ("portrait of a dog", "cat", "dpmpp_2m_karras")
    assert (params.width_px, params.height_px, params.seed, params.adapters) == (832, 1216, 99, (("rex", 0.7),))


def test_a_line_that_is_made_to_keep_the_reader_busy_is_read_at_once(tmp_path):
    text = "a dog\nSteps: 3, " + " " * 900 + "!" + "x " * 50_000
    started = time.process_time()
    assert GenerationParams.from_png(write_png(tmp_path / "a.png", {"parameters": text})).steps == 3
    assert time.process_time() - started < 1


WRONG = [({"prompt": "  "}, "empty"), ({"prompt": 3}, "text"), ({"prompt": "x" * 5001}, "5001")]
WRONG += [({"steps": 0}, "steps"), ({"steps": True}, "steps"), ({"seed": -1}, "seed")]
WRONG += [({"guidance_scale": float("nan")}, "guidance_scale"), ({"num_images": 65}, "num_images")]
WRONG += [({"height_px": 100}, "multiple of 8"), ({"width_px": 8192}, "width_px"), ({"scheduler": "magic"}, "magic")]
WRONG += [({"adapters": [("a", scale)]}, word) for scale, word in ((99, "99"), (float("nan"), "nan"))]
WRONG += [({"text_options": options}, word) for options, word in (("abc", "names with values"), ({"clip": 1}, "clip"))]
WRONG += [({"text_options": {"system_prompt": "x" * 5001}}, "5000")]
WRONG += [({"text_options": {"max_sequence_length": 0}}, "1")]
WRONG += [({"adapters": "abc"}, "pairs"), ({"adapters": [("a", 10**400)]}, "pairs of name and scale")]
WRONG += [({"adapters": [("a", 1), ("a", 2)]}, "twice"), ({"surprise": 1}, "surprise")]


@pytest.mark.parametrize("values, word", WRONG)
def test_what_cannot_be_generated_is_refused_in_one_line(values, word):
    with pytest.raises(UserError) as error:
        GenerationParams.from_dict({"prompt": "a mug"} | values)
    assert word in str(error.value) and "\n" not in str(error.value)


A1111 = "portrait of a dög <lora:rex:0.7>\nNegative prompt: cat\n"
A1111 += "Steps: 30, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 99"
COMFY = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 99, "steps": 30, "cfg": 7.0, "sampler_name": "dpmpp_2m"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 832, "height": 1216, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["8", 0]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "cat"}},
    "8": {"class_type": "PrimitiveString", "inputs": {"value": "portrait of a dög"}},
    "9": {"class_type": "LoraLoader", "inputs": {"lora_name": "rex.safetensors", "strength_model": 0.7}},
}
COMFY["3"]["inputs"] |= {"scheduler": "karras", "model": ["9", 0], "latent_image": ["5", 0]}
COMFY["3"]["inputs"] |= {"positive": ["6", 0], "negative": ["7", 0]}


def exif_of(text: str, kind: str) -> Image.Exif:
    exif = Image.Exif()
    if kind == "ComfyUI":
        exif[0x0110] = f"prompt:{text}"
    else:
        head = {"ascii": b"ASCII\0\0\0", "utf-16-be": b"UNICODE\0", "utf-16-le": b"UNICODE\0"}[kind]
        exif.get_ifd(0x8769)[0x9286] = head + text.encode("utf-8" if kind == "ascii" else kind)
    return exif


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
@pytest.mark.parametrize("kind", ["ascii", "utf-16-be", "utf-16-le", "ComfyUI"])
def test_another_programs_words_are_read_in_a_jpeg_and_a_webp(tmp_path, name, kind):
    text = json.dumps(COMFY) if kind == "ComfyUI" else A1111
    Image.new("RGB", (8, 8)).save(tmp_path / name, exif=exif_of(text, kind))
    check(read_recipe(tmp_path / name).params, kind == "ComfyUI")


BAD_GRAPHS = ["[]", "{}", "[" * 9999, '{"1": 3}', '{"1": {"inputs": {"seed": 1, "cfg": 1, "positive": ["1", 0]}}}']


def test_the_graph_of_comfyui_is_read_in_a_png_and_one_that_says_nothing_is_refused(tmp_path):
    check(read_recipe(write_png(tmp_path / "a.png", {"prompt": json.dumps(COMFY)})).params, is_graph=True)
    for graph in BAD_GRAPHS:
        with pytest.raises(UserError):
            read_recipe(write_png(tmp_path / "a.png", {"prompt": graph}))


def test_a_seed_of_comfyui_beyond_ours_is_replaced_and_that_is_said(tmp_path):
    """Most of its seeds have more than 32 bits: such a picture was refused, also with --seed."""
    graph = COMFY | {"3": {"inputs": COMFY["3"]["inputs"] | {"seed": 2**50 + 99}}}
    recipe = read_recipe(write_png(tmp_path / "a.png", {"prompt": json.dumps(graph)}))
    check(recipe.params, is_graph=True)
    assert recipe.remarks == (f"the seed {2**50 + 99} is beyond 4294967295; 99 replaces it",)


def test_loras_of_comfyui_add_up_whichever_node_loads_them_and_a_picture_that_began_as_another_says_so(tmp_path):
    """Those of rgthree's node were dropped, and a strength of another node was called damage."""
    rex = {"on": True, "lora": "a\\rex.safetensors", "strength": 0.25}
    others = {"model": ["11", 0], "PowerLoraLoaderHeaderWidget": {"type": "x"}, "lora_1": rex}
    others |= {"lora_2": rex | {"on": False}, "lora_3": rex | {"lora": "None"}}
    linked = {"lora_name": "ink.safetensors", "strength_model": ["12", 0]}
    graph = COMFY | {"3": {"inputs": COMFY["3"]["inputs"] | {"denoise": 0.5}}, "10": {"inputs": others}}
    graph |= {"9": {"inputs": COMFY["9"]["inputs"] | {"model": ["10", 0]}}, "11": {"inputs": linked}}
    graph["12"] = {"inputs": {"value": 0.5}}
    recipe = read_recipe(write_png(tmp_path / "a.png", {"prompt": json.dumps(graph)}))
    assert dict(recipe.params.adapters) == pytest.approx({"rex": 0.95, "ink": 0.5})
    assert recipe.remarks == (
        "it was made from another picture, or a smaller one (denoising strength 0.5); here it begins at noise",
    )
    graph["12"] = {"inputs": {"a": 1}}
    with pytest.raises(UserError, match="computes the strength of 'ink'"):
        read_recipe(write_png(tmp_path / "a.png", {"prompt": json.dumps(graph)}))


def test_a_picture_with_two_scales_a_lora_says_which_is_taken_and_one_without_a_prompt_has_none(tmp_path):
    """The tag stayed as words, and the negative prompt became the prompt."""
    text = "a dog <lora:rex:0.8:0.5> <lora:ink:1:1>\nNegative prompt: cat\nSteps: 3"
    recipe = read_recipe(write_png(tmp_path / "a.png", {"parameters": text}))
    assert (recipe.params.prompt, recipe.params.adapters) == ("a dog", (("rex", 0.5), ("ink", 1.0)))
    assert recipe.remarks == ("<lora:rex:0.8:0.5> has two scales; the UNet's replaces the text encoders'",)
    with pytest.raises(UserError, match="the prompt is empty"):
        read_recipe(write_png(tmp_path / "a.png", {"parameters": "\nNegative prompt: cat\nSteps: 3"}))


def check(params: GenerationParams, is_graph: bool) -> None:
    found = (params.prompt, params.negative_prompt, params.adapters, params.scheduler, params.steps, params.seed)
    assert found == ("portrait of a dög", "cat", (("rex", 0.7),), "dpmpp_2m_karras", 30, 99)
    sizes = (832, 1216) if is_graph else (None, None)
    assert (params.guidance_scale, params.width_px, params.height_px) == (7, *sizes)


def text_bomb() -> bytes:
    return png_of(8, 8, b"", (b"zTXt", b"dreambooth_moslora\0\0" + zlib.compress(b" " * 200_000_000, 9)))


NO_RECIPE = ("[]", "{", '{"params": []}', '{"params": {"prompt": {}}}', '{"params": {"prompt": "a"}, "versions": 3}')
ODD = {text: (text, "") for text in NO_RECIPE} | {"nested": ("[" * 100_000, ""), "bare": ({}, "no generation")}
ODD |= {"text": (b"hello", "PNG"), "nothing": (None, "no such file"), "photo": (jpeg, "no generation")}
ODD |= {"webp": (b"RIFF\xff\xff\xff\xffWEBPVP8X\xff\xff\xff\x7f", "no generation")}
ODD |= {"exif": (b"RIFF\0\0\0\0WEBPEXIF\x10\0\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 8, "damaged|no generation")}
ODD |= {"pixel bomb": (png_of(100_000, 100_000, b""), ""), "text bomb": (text_bomb, "")}


@pytest.mark.parametrize("name", ODD)
def test_files_that_are_no_png_or_say_nothing_are_refused(name, tmp_path):
    (content, word), file = ODD[name], tmp_path / "a.png"
    content = content() if callable(content) else content
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        write_png(file, {"dreambooth_moslora": content} if content else {})
    with pytest.raises(UserError, match=word):
        read_recipe(file)


def test_tags_become_adapters_and_leave_the_prompt_and_each_image_has_its_own_seed():
    """A negative seed is drawn."""
    found = split_lora_tags("a dog <lora:rex:0.8> in snow <lora:style>")
    assert found == ("a dog in snow", (("rex", 0.8), ("style", 1.0)))
    assert split_lora_tags("a  dog") == ("a  dog", ())
    written = "<lora:a:.5> <lora:b: 0.5> <lora:c:+1> <lora:d:1:1> <lora:a:0.25>"
    assert split_lora_tags(written) == ("", (("a", 0.75), ("b", 0.5), ("c", 1.0), ("d", 1.0)))
    for tag in ("<lora:rex:0.8:0.5>", "<lora:rex:high>", "<lora:rex:>"):
        with pytest.raises(UserError, match=f"{tag} is not read here: write <lora:NAME:SCALE>"):
            split_lora_tags(f"a dog {tag}")
    params = GenerationParams("dog <lora:rex:0.5>", adapters=(("rex", 1.0), ("b", 0.2))).apply_tags()
    assert params.prompt == "dog" and params.adapters == (("rex", 0.5), ("b", 0.2))
    with pytest.raises(UserError, match="empty"):
        GenerationParams("<lora:rex>").apply_tags()
    images = [GenerationParams("dog", seed=4294967295, num_images=3).for_image(i) for i in range(2)]
    assert [(p.seed, p.num_images) for p in images] == [(4294967295, 1), (0, 1)]
    assert draw_seed(7) == 7 and len({draw_seed(-1) for _ in range(8)}) > 1
