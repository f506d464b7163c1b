"""What the page's handlers compute, without a server: forms, shelf, jobs, what is shown of a run."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from safetensors.numpy import save_file

from dreambooth_moslora.core import UserError, assets_folder
from dreambooth_moslora.generation.params import GenerationParams, Provenance, Recipe
from dreambooth_moslora.ui.app import main, parse_login, resolution_of
from dreambooth_moslora.ui.generate import ask_widgets
from dreambooth_moslora.ui.generate_form import (
    GenerateForm,
    code_snippet,
    format_seconds,
    match_adapters,
    size_choices,
    summary_of,
)
from dreambooth_moslora.ui.jobs import Job
from dreambooth_moslora.ui.page import adapter_facts, build_app, words_of
from dreambooth_moslora.ui.state import AdapterCatalog, AppContext
from dreambooth_moslora.ui.visitors import HISTORY_LENGTH, Picture, Visitor, VisitorCookie

OWNER, OTHER = "a" * 64, "b" * 64
PAGE = SimpleNamespace(username=None, cookies={}, session_hash="page")


def test_the_form_and_the_parameters_are_each_others_inverse():
    form = GenerateForm("a dog", "blur", "dog", 0.5, "cat", 0.2, "none", 1.0, 7, 20, 4.0, "96 x 64", 3, "unipc")
    params = form.params()
    assert (params.width_px, params.height_px, params.adapters) == (96, 64, (("dog", 0.5), ("cat", 0.2)))
    assert GenerateForm.from_params(params) == form


def test_a_fourth_adapter_becomes_a_tag():
    params = GenerationParams("a dog", adapters=(("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 0.3)))
    assert GenerateForm.from_params(params).params().apply_tags().adapters == params.adapters


@pytest.mark.parametrize("resolution", [64, 128, 512, 1024])
def test_size_presets_are_multiples_of_eight_around_the_bases_own(resolution):
    sizes = [tuple(int(n) for n in value.split(" x ")) for _, value in size_choices(resolution)]
    assert sizes[0] == (resolution, resolution) and len(set(sizes)) == 5
    assert all(w % 8 == h % 8 == 0 and abs(w * h / resolution**2 - 1) < 0.15 for w, h in sizes)


def test_the_snippet_is_python_that_gives_the_same_parameters():
    params = GenerationParams('a "dog"', seed=3, steps=2, height_px=64, width_px=64, adapters=(("dog", 0.5),))
    code = code_snippet(params, "toy", {"dog": "dog.safetensors"})
    seen = {}

    class Stand:
        def load_adapter(self, path, name):
            seen["loaded"] = (path, name)

        def generate(self, params):
            seen["params"] = params
            return []

    code = code.replace("from dreambooth_moslora import GenerationParams, SubjectPipeline", "")
    factory = type("SubjectPipeline", (), {"from_base": staticmethod(lambda base: Stand())})
    exec(code, {"GenerationParams": GenerationParams, "SubjectPipeline": factory})
    assert seen == {"loaded": ("dog.safetensors", "dog"), "params": params}


def test_seconds_are_said_as_people_say_them():
    assert [format_seconds(s) for s in (4.21, 42, 65, 7800)] == ["4.2 s", "42 s", "1 min 05 s", "2 h 10 min"]


def visitor(tmp_path, name: str = OWNER) -> Visitor:
    folder = tmp_path / f"visitor-{name[:4]}"
    folder.mkdir(exist_ok=True)
    return Visitor(name, folder)


def test_the_shelf_shows_a_run_to_its_owner_and_command_line_runs_to_all(tmp_path):
    published, raw = "pytorch_lora_weights.safetensors", "moslora_weights.safetensors"
    for file in (f"mine/{published}", f"free/{published}", f"free/checkpoint-20/{raw}", f"free/checkpoint-100/{raw}"):
        (tmp_path / "runs" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / file).write_text("x")
    Job(tmp_path / "runs" / "mine", OWNER, 1, 0.0).save()
    shelf = AdapterCatalog(tmp_path / "adapters", tmp_path / "runs")
    assert set(shelf.files(visitor(tmp_path))) == {"mine", "free", "free@100", "free@20"}
    assert list(shelf.files(visitor(tmp_path, OTHER))) == ["free", "free@100", "free@20"]


def test_a_run_called_like_an_adapter_is_found_under_a_name_of_its_own(tmp_path):
    for file in ("adapters/dog.safetensors", "runs/dog/pytorch_lora_weights.safetensors"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(file)
    shelf = AdapterCatalog(tmp_path / "adapters", tmp_path / "runs")
    assert list(shelf.files()) == ["dog", "dog 2"]
    assert shelf.name_of(tmp_path / "runs" / "dog" / "pytorch_lora_weights.safetensors") == "dog 2"


def test_an_upload_is_its_visitors_alone_and_keeps_a_free_name(tmp_path):
    shelf = AdapterCatalog(tmp_path / "adapters", tmp_path / "runs")
    file = tmp_path / "my <b>dog.safetensors"
    file.write_bytes(b"x")
    ann, bob = visitor(tmp_path), visitor(tmp_path, OTHER)
    names = [shelf.add_upload(file, ann) for _ in range(2)]
    assert names == ["my _b_dog", "my _b_dog 2"] and not shelf.files(bob)
    with pytest.raises(UserError, match="there is no adapter"):
        shelf.path(names[0], bob)


def test_the_history_forgets_the_oldest_with_its_file(tmp_path):
    ann = visitor(tmp_path)
    for number in range(HISTORY_LENGTH + 5):
        (path := tmp_path / f"{number}.png").write_bytes(b"x")
        ann.remember(Picture(path, str(number)))
    assert ann.history[0].caption == str(HISTORY_LENGTH + 4)
    assert len(list(tmp_path.glob("*.png"))) == HISTORY_LENGTH


def test_a_stop_counts_before_ones_turn_has_come_and_only_once(tmp_path):
    pages = [SimpleNamespace(username=None, cookies={}, session_hash=name) for name in ("mine", "other")]
    ctx = context(tmp_path)
    for page in pages:
        ctx.announce(page)
    ctx.stop(pages[0])
    for page, stopped in zip(pages, (True, False)):
        with ctx.stoppable(page) as should_stop:
            assert should_stop() == stopped
    with ctx.stoppable(pages[0]) as should_stop:
        assert not should_stop()
        ctx.stop(pages[0])
        assert should_stop()
    ctx.visitors.close()


def test_the_snippet_names_files_as_they_lie_in_the_project_or_by_the_bare_name(tmp_path, monkeypatch):
    published, raw = "pytorch_lora_weights.safetensors", "moslora_weights.safetensors"
    for file in ("adapters/cat.safetensors", f"runs/dog/{published}", f"runs/dog/checkpoint-20/{raw}"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("x")
    shelf = AdapterCatalog(tmp_path / "adapters", tmp_path / "runs")
    runs = {"dog": "runs/dog", "dog@20": "runs/dog/checkpoint-20"}
    assert shelf.public_paths() == {"cat": "cat.safetensors"} | runs
    monkeypatch.setattr("dreambooth_moslora.ui.state.PROJECT", tmp_path)
    assert shelf.public_paths() == {"cat": "adapters/cat.safetensors"} | runs
    monkeypatch.setattr("dreambooth_moslora.ui.state.PROJECT", tmp_path.parent)
    assert shelf.public_paths()["dog@20"] == f"{tmp_path.name}/runs/dog/checkpoint-20"


def test_an_adapter_says_its_rank_or_the_range_of_its_ranks(tmp_path):
    for facts, said in (({"rank": 8}, "rank 8"), ({"rank": 4, "ranks": {"a": 1, "b": 23}}, "ranks 1 to 23")):
        save_file({"x": np.zeros(1)}, tmp_path / "a.safetensors", {"moslora": json.dumps(facts)})
        assert summary_of(tmp_path / "a.safetensors").sentence() == said
    save_file({"x": np.zeros(1)}, tmp_path / "a.safetensors", {"moslora": json.dumps({"rank": "8", "ranks": [1]})})
    assert summary_of(tmp_path / "a.safetensors").sentence() == ""


def test_an_adapter_of_several_subjects_says_the_words_of_each(tmp_path):
    facts = {"trigger_words": ["sks duck", "zwx rocket", 3], "class_word": "duck"}
    save_file({"x": np.zeros(1)}, tmp_path / "a.safetensors", {"moslora": json.dumps(facts)})
    found = summary_of(tmp_path / "a.safetensors")
    assert found.sentence() == "say “sks duck” or “zwx rocket”" and found.subject == "sks duck"


def handler(ctx: AppContext, name: str):
    """What the page does at that event."""
    return next(event.fn for event in build_app(ctx, []).fns.values() if event.name == name)


def test_choosing_an_adapter_renews_the_prompt_only_while_nobody_has_written_in_it(tmp_path):
    for name in ("sks", "zwx", ""):
        write_adapter(tmp_path / "adapters" / f"{name or 'foreign'}.safetensors", name, "dog" if name else "")
    describe = handler(ctx := context(tmp_path), "describe")
    for old, name, new in (
        ("", "sks", "a photo of a sks dog"),
        ("a photo of a sks dog", "zwx", "a photo of a zwx dog"),
        ("a photo of a sks dog in space", "zwx", "a photo of a sks dog in space"),
        ("a photo of a sks dog", "foreign", "a photo of a sks dog"),
    ):
        assert describe(name, old, PAGE)[1] == new
    ctx.visitors.close()


def context(tmp_path, load=lambda: None) -> AppContext:
    folders = {"adapters_dir": tmp_path / "adapters", "runs_dir": tmp_path / "runs"}
    return AppContext(load, base="x", base_name="x", resolution_px=64, training=False, **folders)


@pytest.mark.parametrize("error, words", [(UserError("there is no base x"), "no base x"), (OSError("/home/me"), "log")])
def test_a_base_that_does_not_load_is_told_to_the_visitor_without_the_machines_secrets(tmp_path, caplog, error, words):
    def load():
        raise error

    ctx = context(tmp_path, load)
    with pytest.raises(UserError, match=words) as told:
        ctx.pipeline()
    assert "/home" not in str(told.value)
    assert ("Traceback" in caplog.text) == isinstance(error, OSError)
    ctx.visitors.close()


def write_adapter(file: Path, trigger: str, class_word: str = "dog") -> None:
    facts = {"trigger_words": [trigger], "class_word": class_word, "base_id": "toy"}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": np.zeros(1, np.float32)}, file, metadata={"moslora": json.dumps(facts)})


def test_the_first_prompt_has_the_trigger_words_and_the_adapters_words_are_no_markup(tmp_path):
    ctx = context(tmp_path)
    for trigger, prompt in (("sks", "a photo of a sks dog"), ("<b>![x](//evil/x.png)", "a photo of a <b>")):
        write_adapter(tmp_path / "adapters" / "a.safetensors", trigger)
        with gr.Blocks():
            widgets, others = ask_widgets(ctx)
        assert widgets["adapter"].value == "a" and widgets["prompt"].value.startswith(prompt)
        assert isinstance(others["about"], gr.HTML) and "<b>" not in others["about"].value
    ctx.visitors.close()


def test_the_axis_of_adapters_starts_with_the_checkpoints_of_the_chosen_run(tmp_path):
    ctx = context(tmp_path)
    write_adapter(tmp_path / "adapters" / "cat.safetensors", "zwx")
    for step in (20, 100):
        write_adapter(tmp_path / "runs" / "dog" / f"checkpoint-{step}" / "moslora_weights.safetensors", "sks")
    write_adapter(tmp_path / "runs" / "dog" / "pytorch_lora_weights.safetensors", "sks")
    axis_values = handler(ctx, "axis_values")
    assert axis_values("adapter", "dog", "", PAGE) == "none, dog@20, dog@100, dog"
    assert axis_values("prompt", "dog", "a dog", PAGE) == "a dog|"
    ctx.visitors.close()


@pytest.mark.parametrize(
    "options, training, public",
    [
        ([], True, False),
        (["--server_name", "localhost", "--auth", "ann:secret"], True, False),
        (["--share"], False, True),
        (["--server_name", "0.0.0.0"], False, True),
        (["--server_name", "0.0.0.0", "--auth", "ann:secret"], True, True),
        (["--share", "--auth", "ann:secret"], True, True),
        (["--allowed_host", "pictures.example.org"], True, True),
    ],
)
def test_a_public_address_needs_a_login_for_training_and_is_guarded(monkeypatch, capsys, options, training, public):
    seen = []

    def stop_here(args, **how):
        seen.append(how)
        raise UserError("far enough")

    monkeypatch.setattr("dreambooth_moslora.ui.app.context_of", stop_here)
    assert main(options) == 2 and seen == [{"training": training, "public": public}]
    assert ("warning: everybody" in capsys.readouterr().err) == (not training)


def test_facts_have_names_that_people_read():
    file = assets_folder() / "adapters" / "rocket.safetensors"
    assert {"DoRA", "Size (MiB)", "Trigger words"} <= dict(adapter_facts(str(file))).keys()
    assert [words_of(v) for v in (True, False, None, 0.25)] == ["yes", "no", "", "0.25"]


def test_the_resolution_is_read_without_the_weights(tiny_base, tmp_path):
    assert resolution_of(tiny_base) == 64 and resolution_of(None) == 1024 and resolution_of(tmp_path) == 1024


def test_app_mistakes_end_with_one_line(capsys):
    assert main(["--auth", "nocolon"]) == 2
    assert capsys.readouterr().err == "error: --auth needs NAME:PASSWORD\n"
    assert parse_login("ann:se:cret") == ("ann", "se:cret")


def test_a_page_below_a_cookie_keeps_it():
    """Websocket and asset requests pass through untouched."""
    import asyncio

    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    scopes = [{"type": "http", "path": path, "headers": []} for path in ("/", "/assets/x.js")]
    for scope in scopes:
        asyncio.run(VisitorCookie(app)(scope, None, send))
    assert [bool(message["headers"]) for message in sent] == [True, False]


def test_a_recipes_adapter_is_found_by_content_and_a_changed_one_is_told(tmp_path):
    for name, content in (("renamed", b"dog"), ("cat", b"another cat")):
        (tmp_path / name).write_bytes(content)
    files = {name: tmp_path / name for name in ("renamed", "cat")}
    sha = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("dog", "cat", "rex")}
    params = GenerationParams("x", adapters=(("dog", 0.5), ("cat", 1.0), ("rex", 1.0)))
    settled, remarks = match_adapters(Recipe(params, Provenance("toy", tuple(sha.items())), True), files, "other")
    assert settled.adapters == (("renamed", 0.5), ("cat", 1.0), ("rex", 1.0))
    assert [
        word in remark for word, remark in zip(("cat here is another", "rex is not here", "base toy"), remarks)
    ] == [True] * 3
