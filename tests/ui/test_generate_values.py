"""The form of the Generate tab, what a picture or an adapter fills into it, and what is refused
before it is read."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import PIL.Image
import pytest
import torch
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.paths import get_assets_folder
from dreambooth_moslora.disk.run_folder import NO_ADAPTER
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.image_params import (
    GenerationParams,
    Image,
    Provenance,
    Recipe,
    Step,
    read_recipe,
)
from dreambooth_moslora.lora.describe import format_ranks
from dreambooth_moslora.ui.adapter_summary import read_summary
from dreambooth_moslora.ui.drawing import compare, generate_images
from dreambooth_moslora.ui.events import format_message, wrap_errors
from dreambooth_moslora.ui.generate_adapters import find_fitting_adapter
from dreambooth_moslora.ui.generate_values import (
    GenerateForm,
    list_remarks,
    list_size_choices,
)
from dreambooth_moslora.ui.generate_widgets import build_prompt_widgets
from dreambooth_moslora.ui.html import format_seconds, render_facts, render_notice
from dreambooth_moslora.ui.page import build_app, list_adapter_facts
from dreambooth_moslora.ui.workspace import SavedImage
from tests.ui.conftest import PAGE, find_handler, write_adapter


def test_form_and_params_round_trip():
    form = GenerateForm("a dog", "blur", "dog", 0.5, 7, 20, 4.0, "96 x 64", 3, "unipc")
    params = form.to_params()
    assert (params.width_px, params.height_px, params.adapters) == (96, 64, (("dog", 0.5),))
    assert GenerateForm.from_params(params) == form
    two = replace(params, adapters=(("a", 1.0), ("b", 0.3)))
    # the second is a tag
    assert GenerateForm.from_params(two).to_params().apply_tags().adapters == two.adapters


@pytest.mark.parametrize("resolution", [64, 1024])
def test_size_presets_are_multiples_of_eight(resolution):
    sizes = [
        tuple(int(n) for n in value.split(" x ")) for _, value in list_size_choices(resolution)
    ]
    assert sizes[0] == (resolution, resolution) and len(set(sizes)) == 5
    assert all(w % 8 == h % 8 == 0 and abs(w * h / resolution**2 - 1) < 0.15 for w, h in sizes)


HALF = "a \ud800"
"""JSON can hold a lone surrogate."""


def save_png_with_text(file: Path, name: str, text: str, **how) -> Path:
    (info := PngInfo()).add_text(name, text, **how)
    PIL.Image.new("RGB", (8, 8)).save(file, pnginfo=info)
    return file


ODD_RECIPES = {
    "an endless scale": {"adapters": [["a", 10**400]]},
    "an endless name": {"x" * 3_000_000: 1},
    "an endless number": {"steps": 10**400},
    "an endless scheduler": {"scheduler": "x" * 3_000_000},
    "a list for a scheduler": {"scheduler": []},
    "half a character": {"prompt": HALF},
    "half a name": {"adapters": [[HALF, 1.0]]},
    "half a hash": {},
}


@pytest.mark.parametrize("kind", ODD_RECIPES)
def test_odd_recipe_is_refused_in_a_short_line(tmp_path, kind):
    recipe = {"params": {"prompt": "a dog"} | ODD_RECIPES[kind]}
    recipe |= {"adapter_sha256": {HALF: "x"}} if kind == "half a hash" else {}
    file = save_png_with_text(
        tmp_path / "a.png", "dreambooth_moslora", json.dumps(recipe), zip=True
    )
    with pytest.raises(gr.Error) as error:
        wrap_errors(read_recipe)(file)
    assert len(error.value.message) < 400 and "server's log" not in error.value.message
    assert "half" not in kind or "damaged" in error.value.message


def test_missing_adapter_and_other_base_are_remarked(tmp_path):
    params = GenerationParams("x", adapters=(("dog", 0.5), ("rex", 1.0)))
    remarks = list_remarks(Recipe(params, Provenance("toy")), {"dog": tmp_path / "dog"}, "other")
    expected = ("rex is not here", "base toy")
    assert all(text in remark for text, remark in zip(expected, remarks, strict=True))


@pytest.mark.parametrize(
    "facts, sentence, subject",
    [
        ({}, "say “sks dog” · for toy", "sks dog"),
        ({"rank": "4"}, "", ""),
        ({"trigger_words": ["sks duck"], "class_word": ""}, "say “sks duck” · for toy", "sks duck"),
    ],
)
def test_summary_names_the_subject(tmp_path, facts, sentence, subject):
    facts = {"trigger_words": ["sks"], "class_word": "dog"} | facts
    summary = read_summary(write_adapter(tmp_path / "a.safetensors", **facts))
    assert (summary.format_sentence(), summary.subject) == (sentence, subject)


def test_selecting_an_adapter_replaces_only_untouched_prompts(tmp_path, context):
    for name in ("sks", "zwx", ""):
        write_adapter(
            tmp_path / "adapters" / f"{name or 'foreign'}.safetensors", name, "dog" if name else ""
        )
    describe = find_handler(context(), "describe")
    for old, name, new in (
        ("", "sks", "a photo of a sks dog"),
        ("a photo of a sks dog", "zwx", "a photo of a zwx dog"),
        ("a photo of a sks dog in space", "zwx", "a photo of a sks dog in space"),
        ("a photo of a sks dog", "foreign", "a photo of a sks dog"),
    ):
        assert describe(name, old)[1] == new


def test_first_prompt_has_trigger_words_and_escapes_markup(tmp_path, context):
    for trigger, prompt in (
        ("sks", "a photo of a sks dog"),
        ("<b>![x](//evil/x.png)", "a photo of a <b>"),
    ):
        write_adapter(tmp_path / "adapters" / "a.safetensors", trigger)
        with gr.Blocks():
            widgets, parts = build_prompt_widgets(context())
        assert widgets["adapter"].value == "a" and widgets["prompt"].value.startswith(prompt)
        assert isinstance(parts["about"], gr.HTML) and "<b>" not in parts["about"].value


def test_facts_and_seconds_are_readable():
    file = get_assets_folder() / "adapters" / "rocket.safetensors"
    facts = dict(list_adapter_facts(str(file)))
    assert (
        facts["Size (MiB)"] == str(round(file.stat().st_size / 2**20, 3))
        and "Trigger words" in facts
    )
    assert facts["Ranks"] == "rank 16 in 146 layers" and facts["DoRA"] == "no"
    assert format_ranks({"1": 2, "2": 3, "4": 1, "9": 5}) == "ranks 1 to 9 in 11 layers"
    assert [format_seconds(s) for s in (4.21, 42, 65, 7800)] == [
        "4.2 s",
        "42 s",
        "1 min 05 s",
        "2 h 10 min",
    ]


def test_quoted_surrogates_can_be_sent():
    def fail() -> None:
        raise UserError(HALF)

    with pytest.raises(gr.Error) as error:
        wrap_errors(fail)()
    for html in (render_notice(HALF), render_facts([(HALF, HALF)]), error.value.message):
        assert html.encode()


def test_inspect_and_info_escape_control_characters(tmp_path, capsys):
    pair = {"unet.a.lora_A.weight": torch.ones(1, 4), "unet.a.lora_B.weight": torch.ones(4, 1)}
    path = tmp_path / "dog.safetensors"
    save_file(pair, path, metadata={"modelspec.title": "a\u202eb\x1b[31m"})
    assert main(["info", str(path)]) == 0
    tables = (
        render_facts(list_adapter_facts(str(path))),
        render_facts([("Prompt", "a\u202eb\x1b[31m")]),
    )
    for text in (*tables, capsys.readouterr().out):
        assert r"a\u202eb\x1b[31m" in text and not {"\u202e", "\x1b"} & set(text)


def test_message_is_capitalised_but_not_a_file_name():
    assert format_message("dog.safetensors is broken") == "dog.safetensors is broken"
    assert format_message("drop a picture") == "Drop a picture"


@pytest.mark.parametrize("run", [generate_images, compare])
def test_card_reports_loading_and_generation_errors(context, run):
    def no_base():
        raise UserError("there is no base <x>")

    def breaking(params, should_stop):
        raise RuntimeError("/secret/path")
        yield

    def last_card(frames) -> str:
        cards = []
        with pytest.raises((UserError, RuntimeError)):
            for frame in frames:
                cards.append(frame.status)
        return cards[-1]

    form = GenerateForm("a dog", adapter="rex" if run is compare else "none")
    assert "There is no base &lt;x&gt;" in last_card(run(context(no_base), form, PAGE))
    broken = context(lambda: SimpleNamespace(generate=breaking))
    card = last_card(generate_images(broken, GenerateForm("a dog"), PAGE))
    assert "server&#x27;s log" in card and "secret" not in card


@pytest.mark.filterwarnings("ignore:invalid value")
def test_black_image_is_explained(context, subject, state, tmp_path):
    """Values that overflow inside the model end as black pixels, without an error."""
    (tmp_path / "adapters").mkdir()
    save_file(
        {key: value * 1e30 for key, value in state.items()},
        tmp_path / "adapters" / "huge.safetensors",
    )
    page = context(lambda: subject)
    for adapter, is_black in (("huge", True), ("none", False)):
        frames = list(
            generate_images(
                page, GenerateForm("a dog", adapter=adapter, steps=1, size="64 x 64"), PAGE
            )
        )
        assert (
            "1 of them is black: an adapter" in frames[-1].status.replace("&#x27;", "'")
        ) == is_black


def test_gallery_selection_survives_new_images(context):
    """At the end the first counted as chosen, and “Use these settings” took its seed."""
    params = GenerationParams("a dog", num_images=2)
    images = [
        Image(n, PIL.Image.new("RGB", (8, 8), "red"), replace(params, seed=n), Provenance())
        for n in range(2)
    ]
    events = [event for image in images for event in (Step(image.index, 2, 1, 1, 0.0), image)]
    page = build_app(context(lambda: SimpleNamespace(generate=lambda *_: iter(events))))
    generate = next(event for event in page.fns.values() if event.name == "generate")
    selections = [frame[-2] for frame in generate.fn(PAGE, prompt="a dog", num_images=2)]
    assert [value for value in selections if value != gr.skip()] == [0] and selections.index(
        0
    ) < len(selections) - 3
    setting = {event.name for event in page.fns.values() if generate.outputs[-2] in event.outputs}
    assert setting == {"generate", "select"}


def test_history_image_restores_settings_and_remarks_on_base(context, monkeypatch):
    ctx, remarks = context(title="owner_base", public_name="owner/base"), []
    monkeypatch.setattr(gr, "Warning", remarks.append)
    events = {event.name: event.fn for event in build_app(ctx).fns.values()}
    for prompt, base in (("a dog", "owner/base"), ("a cat", "other")):
        ctx.workspace.add_to_history(save_image(ctx.workspace.root, prompt, base))
    newest_first = events["list_history"]()
    prompts = [events["restore_recipe"](newest_first, place)[0] for place in (0, 1)]
    assert prompts == ["a cat", "a dog"]
    assert remarks == ["It was made with the base other; this page has owner/base"]
    with pytest.raises(gr.Error, match="no picture yet"):
        events["restore_recipe"](None, 0)


def save_image(folder: Path, prompt: str, base: str = "") -> SavedImage:
    image = Image(0, PIL.Image.new("RGB", (8, 8)), GenerationParams(prompt), Provenance(base))
    return SavedImage(image.save(folder / f"{prompt}.png"), prompt)


def write_header(file: Path, header: bytes, content: int = 0) -> Path:
    with file.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + content)
    return file


@pytest.mark.parametrize(
    "header", [b"[" * 100_000, b"[]", b'{"lora": 1}', b'{"lora": {"shape": ["x"]}}', b"\xff"]
)
def test_odd_header_is_refused(tmp_path, header):
    file = write_header(tmp_path / "odd.safetensors", header)
    with pytest.raises(UserError, match="odd"):
        list_adapter_facts(str(file))


def test_toy_adapter_is_preselected_for_toys_only(context):
    """The page of a large base had the toy's rocket in its form."""
    preselected = {}
    for base in ("toy", "owner/base"):
        ctx = context(name=base)
        write_adapter(ctx.catalog.adapters_dir / "rocket.safetensors")
        preselected[base] = find_fitting_adapter(ctx)
    assert preselected == {"toy": "rocket", "owner/base": NO_ADAPTER}


def test_each_tab_has_one_primary_button(context):
    """In the comparison two were green."""
    counts = Counter()
    for block in build_app(context()).blocks.values():
        if isinstance(block, gr.Button) and block.variant == "primary":
            parent = block
            while parent.parent.parent is not None and not isinstance(parent, gr.Tab):
                parent = parent.parent
            counts[parent.label] += 1
    assert counts == {"Generate": 1, "Train": 1, "Inspect": 1}
