"""Program `app.py`: its arguments, bases, imports, and memory."""

import argparse
import ctypes
import json
import shutil
import subprocess
import sys
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace

import diffusers
import gradio as gr
import numpy as np
import psutil
import pytest
import transformers
from safetensors.numpy import save_file

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.disk.paths import get_assets_folder
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import toy_bases
from dreambooth_moslora.settings.family_facts import SDXL_HUB_ID, get_facts
from dreambooth_moslora.ui import app
from dreambooth_moslora.ui.drawing import generate_images
from dreambooth_moslora.ui.generate_values import GenerateForm
from dreambooth_moslora.ui.generate_widgets import build_settings_widgets
from dreambooth_moslora.ui.page import MAX_SESSIONS, build_app
from dreambooth_moslora.ui.state import PageBase
from tests.helpers.tiny_adapters import save_diffusers_lora
from tests.helpers.tiny_families import tiny_pipeline
from tests.ui.conftest import PAGE


@pytest.mark.parametrize(
    ("options", "is_refused"),
    [
        ([], False),
        (["--server_name", "localhost"], False),
        (["--share"], True),
        (["--server_name", "0.0.0.0"], True),
        (["--allowed_host", "pictures.example.org"], True),
        (["--share", "--public"], False),
        (["--server_name", "0.0.0.0", "--auth", "ann:secret"], False),
        (["--allowed_host", "pictures.example.org", "--auth", "ann:secret"], False),
        (["--allowed_host", "pictures.example.org", "--public"], False),
    ],
)
def test_exposed_page_needs_login_or_public(monkeypatch, capsys, options, is_refused):
    def stop_here(args):
        raise UserError("far enough")

    monkeypatch.setattr("dreambooth_moslora.ui.app.build_context", stop_here)
    assert app.main(options) == 2
    error = capsys.readouterr().err
    assert error == f"error: {app.LOGIN_WARNING if is_refused else 'far enough'}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--auth", "nocolon"], "--auth needs NAME:PASSWORD\n"),
        (["--adapters_dir", "x"], "--adapters_dir x: there is no such folder\n"),
        *((["--runs_dir", f"{{}}/{place}"], "--runs_dir") for place in ("file", "file/below")),
        (["--runs_dir", "/proc/none/below"], "--runs_dir"),
    ],
)
def test_wrong_argument_prints_one_line(tmp_path, capsys, options, message):
    (tmp_path / "file").write_text("x")
    assert (
        app.main(["--runs_dir", str(tmp_path), *(option.format(tmp_path) for option in options)])
        == 2
    )
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_usage_is_one_line(capsys):
    with pytest.raises(SystemExit):
        app.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: app.py [--FLAG VALUE …]\n\nA web page")


def test_password_may_have_colon():
    assert app.parse_login("ann:se:cret") == ("ann", "se:cret")


def test_base_resolution_is_read_without_weights(tiny_base, tmp_path):
    """It trained Stable Diffusion 1.5 at 1024 px, where it was one file or on the hub. The other is
    one at 768 px."""
    configs = {
        "model_index": {"_class_name": "StableDiffusionPipeline"},
        "unet/config": {"sample_size": 96},
    }
    configs["vae/config"] = {"block_out_channels": [8] * 4}
    for name, content in configs.items():
        (path := tmp_path / "other" / f"{name}.json").parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    facts, file = get_facts("StableDiffusionPipeline"), tmp_path / "sd1.safetensors"
    save_file({facts.marker_tensor: np.zeros(1, np.float32)}, file)
    sides = {tiny_base: 64, tmp_path / "other": 768, file: 512, facts.models[0].hub_id: 512}
    sides |= {"owner/unknown": 1024}
    assert {
        base: app.build_page_base("x", Base.find(base)).resolution_px for base in sides
    } == sides


def test_settings_follow_base_family(tmp_path, context):
    settings = {}
    for name in ("sd1", "flux"):
        tiny_pipeline(name, tmp_path / name / "files").save_pretrained(tmp_path / name / "base")
        ctx = context(name=str(tmp_path / name / "base"))
        with gr.Blocks():
            fields = build_settings_widgets(ctx)
        visible = {field for field in ("negative_prompt", "scheduler") if fields[field].visible}
        settings[name] = (
            visible,
            fields["guidance_scale"].value,
            Base.find(ctx.base_name).resolution_px,
        )
    assert settings == {
        "sd1": ({"negative_prompt", "scheduler"}, 7.5, 32),
        "flux": (set(), 3.5, 1024),
    }


TOY = get_assets_folder() / "toy-sdxl"


@pytest.fixture
def base_index(tmp_path):
    """Write the index of a base."""
    (folder := tmp_path / "mine").mkdir()
    shutil.copy(TOY / "model_index.json", folder)
    return folder


def test_bases_are_listed_with_their_needs(base_index, tiny_base):
    toy = Base.find("toy")
    titles = ["toy", "toy-zimage", "SDXL", "Z-Image", "FLUX.1", "FLUX.2 klein"]
    assert list(app.list_bases(toy)) == titles
    assert list(app.list_bases(Base.find(base_index))) == ["mine", *titles]
    assert app.describe_base(toy) == toy_bases.TOY_SUMMARY.format(
        "SDXL"
    ) and "practice" in app.format_note(toy)
    needs = {SDXL_HUB_ID: (4, 6.9), "Tongyi-MAI/Z-Image": (6, 20.5)}
    needs["black-forest-labs/FLUX.1-dev"] = (6, 33.7)
    for name, (card_gb, download_gb) in needs.items():
        note = f"card of {card_gb} GB, {download_gb} GB to download"
        assert app.format_note(Base.find(name)) == note
    assert "64 px, 0.0 GiB of weights: it needs no GPU" in app.describe_base(Base.find(tiny_base))
    assert "wants a GPU" in app.describe_base(Base.find(base_index))
    (link := base_index.with_name("link")).symlink_to(base_index)
    page_base = app.build_page_base("a title", Base.find(link))
    # as `from_base` names it in pictures
    assert (page_base.title, page_base.public_name) == ("a title", "link")


def test_base_with_missing_weights_does_not_stop_the_start(base_index):
    (base_index / "unet").mkdir()
    (base_index / "unet" / "x.safetensors").symlink_to(base_index / "gone")
    page_base = app.build_page_base("mine", Base.find(base_index))
    assert page_base.description.startswith("it cannot be used: [Errno 2]")


def test_missing_base_advises_the_pages_flag(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    problem = app.describe_problem(Base.find("owner/elsewhere"))
    assert "`python app.py --base FOLDER_OR_FILE`, or fetch it" in problem and len(problem) < 300
    assert app.describe_problem(Base.find("toy")) == ""


@pytest.mark.parametrize("public", [False, True])
def test_public_page_offers_one_base(tmp_path, public):
    app.add_arguments(parser := argparse.ArgumentParser())
    argv = ["--runs_dir", str(tmp_path / "runs"), *["--public"] * public]
    ctx = app.build_context(parser.parse_args(argv))
    ctx.workspace.close()
    assert list(ctx.bases) == ["toy", *([] if public else ["toy-zimage", *app.OFFERED_MODELS])]
    wait([ctx._pipeline])


def raise_user_error():
    raise UserError("it has no unet")


def test_loading_the_base_prints_no_bars(capfd):
    """Four bars of the libraries stood after the page's address on the console."""
    for library in (diffusers, transformers):
        library.utils.logging.enable_progress_bar()
    app.build_page_base("toy", Base.find("toy")).load()
    assert "%|" not in capfd.readouterr().err


def test_tabs_contain_tabs_alone(context):
    """A state between them took the place of a tab, whose button then had its neighbour's name."""
    tab_rows = [block for block in build_app(context()).blocks.values() if type(block) is gr.Tabs]
    assert [len(tabs.children) for tabs in tab_rows] == [3, 3]
    assert all(isinstance(child, gr.Tab) for tabs in tab_rows for child in tabs.children)


def test_failed_base_choice_keeps_the_old_base(context):
    old, new = SimpleNamespace(), SimpleNamespace()
    new_base, broken = (
        PageBase("other", "/x/other", 512, lambda: new),
        PageBase("broken", "broken", 512, raise_user_error),
    )
    ctx = context(lambda: old, more_bases=[new_base, broken])
    with pytest.raises(UserError, match="no unet"):
        list(ctx.choose(broken))
    assert (ctx.base, ctx.resolution_px, ctx.wait_for_pipeline()) == ("x", 64, old)
    list(ctx.choose(new_base))
    assert (ctx.base, ctx.base_name, ctx.resolution_px, ctx.wait_for_pipeline()) == (
        "other",
        "/x/other",
        512,
        new,
    )
    assert not ctx.current_base.is_small


INSPECTED_WHILE_LOADING = '''
"""Inspect an adapter as soon as the loading of the base imports its first library; count who
imported."""
import argparse, json, sys, threading
from dreambooth_moslora.ui import app
from dreambooth_moslora.ui.page import list_adapter_facts

imports, begun = [], threading.Event()

class Spy:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "transformers", "peft"):
            imports.append(threading.get_ident())
            begun.set()

sys.meta_path.insert(0, Spy())
parser = argparse.ArgumentParser()
app.add_arguments(parser)
args = parser.parse_args(["--base", sys.argv[1], "--runs_dir", sys.argv[2]])
ctx = app.build_context(args)
begun.wait(60)
facts = dict(list_adapter_facts(sys.argv[3]))
ctx.wait_for_pipeline()
ctx.workspace.close()
mine = imports.count(threading.get_ident())
print(json.dumps({"mine": mine, "all": len(imports), "facts": len(facts)}))
'''


@pytest.mark.slow
def test_inspecting_while_loading_imports_in_one_thread(tiny_base, subject, tmp_path):
    adapter = save_diffusers_lora(subject.pipeline.unet, tmp_path / "made", seed=1)
    adapter = adapter.rename(tmp_path / "dog.safetensors")
    command = [sys.executable, "-c", INSPECTED_WHILE_LOADING, tiny_base, tmp_path / "runs", adapter]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["facts"] and report["all"] and report["mine"] == 0


BLOCKS, BLOCK_BYTES = 2500, 60_000


@pytest.fixture
def _glibc():
    if not hasattr(ctypes.CDLL(None), "malloc_info"):
        pytest.skip("no glibc here")


@pytest.mark.usefixtures("_glibc")
def test_freed_memory_returns_to_the_system(context, subject):
    """Many small blocks below one that stays: without being asked, glibc keeps them all."""
    ctx, form = context(lambda: subject), GenerateForm("a dog", steps=1, size="64 x 64")
    list(generate_images(ctx, form, PAGE))
    last_block = free_all_blocks_but_last()
    before = psutil.Process().memory_info().rss
    list(generate_images(ctx, form, PAGE))
    after = psutil.Process().memory_info().rss
    ctypes.CDLL(None).free(last_block)
    assert before - after > BLOCKS * BLOCK_BYTES / 2


def free_all_blocks_but_last() -> ctypes.c_void_p:
    """Allocate and write 150 MB, and free it but for the last block, which is returned."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    blocks = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(BLOCK_BYTES))) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK_BYTES)
    for block in blocks[:-1]:
        libc.free(block)
    return blocks[-1]


def test_oldest_session_is_dropped_first(served):
    sessions = served.page.state_holder
    sessions.session_data.clear()
    first, *newer_sessions = (f"session{number}" for number in range(MAX_SESSIONS + 1))
    sessions[first]
    sessions.session_data.update(dict.fromkeys(newer_sessions[:-1], sessions[first]))
    sessions[newer_sessions[-1]]
    assert set(sessions.session_data) == set(newer_sessions)
    sessions.session_data.clear()
