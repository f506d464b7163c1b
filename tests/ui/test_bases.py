"""The bases that the page offers: found by name, told in a sentence, and chosen while the page runs."""

import argparse
import shutil
from concurrent.futures import wait
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from dreambooth_moslora.core import UserError, assets_folder
from dreambooth_moslora.ui.app import add_arguments, context_of
from dreambooth_moslora.ui.bases import CHECKPOINT_MARK, OF_TOY, PageBase, about, bases_below, offered
from tests.helpers.browser import IN_BROWSER, says, set_number, visit
from tests.helpers.ui_server import serve
from tests.ui.conftest import write_adapter

TOY = assets_folder() / "toy-sdxl"


@pytest.fixture
def shelf(tmp_path):
    """Two bases, an adapter, and a base too deep to be found."""
    for place in ("mine", "a/b/c/deep"):
        (folder := tmp_path / place).mkdir(parents=True)
        shutil.copy(TOY / "model_index.json", folder)
    save_file({f"{CHECKPOINT_MARK}x": np.zeros(1, np.float32)}, tmp_path / "a" / "one.safetensors")
    write_adapter(tmp_path / "dog.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    return tmp_path


def test_folders_and_checkpoints_are_found_and_offered_by_name(shelf):
    assert bases_below(shelf) == [shelf / "mine", shelf / "a" / "one.safetensors"]
    assert list(offered("toy", shelf)) == ["toy", "mine", "one.safetensors"]
    assert list(offered(str(shelf / "x" / ".." / "mine"), shelf)) == ["mine", "toy", "one.safetensors"]
    with pytest.raises(UserError, match="nowhere is not a folder"):
        offered("toy", shelf / "nowhere")


def test_a_sentence_says_what_a_base_is_and_needs(tiny_base):
    assert about("toy", TOY, 128) == OF_TOY
    assert "64 px, 0.0 GiB of weights: it needs no GPU" in about(str(tiny_base), tiny_base, 64)
    assert "wants a GPU" in about(str(tiny_base), tiny_base, 1024)


@pytest.mark.parametrize("public", [False, True])
def test_a_public_page_has_the_operators_base_alone(shelf, tmp_path, public):
    add_arguments(parser := argparse.ArgumentParser())
    args = parser.parse_args(["--bases_dir", str(shelf), "--runs_dir", str(tmp_path / "runs")])
    ctx = context_of(args, training=False, public=public)
    ctx.visitors.close()
    assert list(ctx.bases) == (["toy"] if public else ["toy", "mine", "one.safetensors"])
    wait([ctx._pipeline])


def fails():
    raise UserError("it has no unet")


def test_another_base_is_taken_once_it_is_loaded_and_the_old_one_stays_where_it_fails(context):
    old, new = SimpleNamespace(), SimpleNamespace()
    other, broken = PageBase("other", "/x/other", 512, lambda: new), PageBase("broken", "broken", 512, fails)
    ctx = context(lambda: old, others=[other, broken])
    with pytest.raises(UserError, match="no unet"):
        list(ctx.choose(broken))
    assert (ctx.base, ctx.resolution_px, ctx.pipeline()) == ("x", 64, old)
    list(ctx.choose(other))
    assert (ctx.base, ctx.base_name, ctx.resolution_px, ctx.pipeline()) == ("other", "/x/other", 512, new)
    assert ctx.jobs.told("/x/other is damaged") == "other is damaged" and not ctx.turns.is_small


def in_browser(test):
    for mark in IN_BROWSER:
        test = mark(test)
    return test


def choose(page, title: str) -> None:
    page.click("#base input")
    page.get_by_role("option", name=title, exact=True).click()


@in_browser
def test_a_base_is_chosen_on_the_page(tiny_base, tmp_path, browser):
    from dreambooth_moslora.generation.pipeline import SubjectPipeline

    toy = PageBase("toy", "toy", 128, lambda: SubjectPipeline.from_base("toy"), OF_TOY, ("a {} of toys",))
    broken = PageBase("broken", "broken", 64, fails)
    with (
        serve(tiny_base, tmp_path, public=False, others=[toy, broken]) as server,
        visit(browser, server.url) as visited,
    ):
        page = visited.page
        choose(page, "broken")
        says(page, "about_base", "broken is not loaded: it has no unet")
        assert page.input_value("#base input") == "tiny"
        choose(page, "toy")
        says(page, "about_base", "base: toy, a 128 px practice model")
        assert page.input_value("#size input") == "Square 128 × 128"
        page.fill("#prompt textarea", "a lamp")
        set_number(page, "steps", 3)
        page.click("#adapter input")
        page.get_by_role("option", name="none", exact=True).click()
        page.click("#run")
        says(page, "status", "1 picture in")
        assert not visited.errors
