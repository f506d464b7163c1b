"""The tools behind the docs and the studies: copies of subjects, bare photos, sheets, the
tables."""

import argparse
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from dreambooth_moslora.base import devices
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.settings.family_facts import SDXL_HUB_ID
from dreambooth_moslora.settings.metric_kinds import METRICS, Metric
from dreambooth_moslora.settings.setting_names import SETTINGS
from tools import bare_photos, formats_table, pictures, systems, tables, words


def photo_and_mask(box) -> tuple[Image.Image, Image.Image]:
    mask = Image.new("L", (80, 80))
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return Image.merge("RGB", [mask] * 3), mask


def test_a_photo_is_cropped_around_its_subject():
    photo, mask = photo_and_mask((4, 60, 20, 75))  # at the left, low
    wide, tall = (
        bare_photos.crop_strip(photo, mask, wide=True),
        bare_photos.crop_strip(photo, mask, wide=False),
    )
    assert wide.size == (80, 60) and tall.size == (60, 80)
    white = mask.histogram()[255]
    assert [image.convert("L").histogram()[255] for image in (wide, tall)] == [white, white]
    photo, mask = photo_and_mask((30, 35, 49, 44))
    assert bare_photos.crop_strip(photo, mask, wide=True).getbbox() == (30, 25, 50, 35)
    assert bare_photos.crop_strip(photo, mask, wide=False).getbbox() == (20, 35, 40, 45)


def test_the_docs_have_no_picture_that_the_tool_does_not_make():
    names = {path.name for path in Path("assets/pictures").iterdir()}
    picture_names = {name for name in names if not name.startswith("page_")}
    assert picture_names == {f"{name}.jpg" for name in pictures.JPEGS}
    pages = [Path("README.md"), *Path("docs").glob("*.md")]
    text = "".join(path.read_text(encoding="utf-8") for path in pages)
    assert [name for name in sorted(names) if f"assets/pictures/{name}" not in text] == []


@pytest.mark.slow
def test_a_picture_is_drawn_from_the_run_that_is_there(tmp_path):
    run = RunDir(tmp_path / "work" / "quickstart")
    run.path.mkdir(parents=True)
    shutil.copy("assets/adapters/rocket.safetensors", run.adapter_path)
    Image.new("RGB", (2064, 400), "teal").save(run.contact_sheet_path)
    where = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    pictures.main([*where, "--only", "quick_start", "check_crops"])
    images = {path.stem: Image.open(path) for path in (tmp_path / "out" / "pictures").iterdir()}
    assert images["quick_start"].size == (1032, 200) and images["check_crops"].width == 900


def test_tables_are_up_to_date_and_list_each_setting_once():
    for page, text in tables.render_pages().items():
        assert page.read_text(encoding="utf-8") == text, "run: python -m tools.tables"
    listed = tables.render_settings()
    assert [listed.count(f"`--{name}` |") for name in SETTINGS] == [1] * len(SETTINGS)


@pytest.mark.parametrize("has_bf16", [False, True])
def test_the_plan_of_a_card_is_the_same_on_every_cpu(monkeypatch, has_bf16):
    monkeypatch.setattr(devices, "has_fast_bf16", lambda: has_bf16)
    plan, peak_gib = tables.choose_card_plan(SDXL_HUB_ID, 24)
    assert (plan, round(peak_gib, 1)) == ("`full`", 16.2)


def test_every_table_has_a_page_and_a_new_row_is_in_it(monkeypatch):
    text = "".join(page.read_text(encoding="utf-8") for page in tables.DOCS.glob("*.md"))
    marked = [name for _, name, _ in tables.TABLE_PATTERN.findall(text)]
    assert sorted(marked) == sorted(tables.TABLES)
    monkeypatch.setitem(METRICS, "smile", Metric("Smile", help="does it smile?", better="higher"))
    assert "Smile | `smile` | does it smile? | higher" in tables.format_measures()


def test_the_page_of_formats_is_up_to_date():
    text = formats_table.OUT_PATH.read_text(encoding="utf-8")
    assert text == formats_table.render_page(), "run: python -m tools.formats_table"


@pytest.mark.slow
def test_an_unguarded_call_that_one_system_lacks_is_listed(tmp_path):
    pytest.importorskip("mypy")
    (file := tmp_path / "program.py").write_text(
        "import os, sys\nx: int = 'a'\nos.sysconf('SC_PAGE_SIZE')\nif sys.platform != 'win32':\n"
        "    os.getuid()\n"
    )
    (line,) = systems.list_problems(str(file))
    assert ":3: error: Module has no attribute" in line and line.endswith("(win32)")


def test_words_rejects_a_vague_name_with_its_place(tmp_path, capsys):
    (file := tmp_path / "program.py").write_text("losses = [1.0]\nfound = losses[0]\n")
    assert words.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out == f"{file}:2: `found` does not say what it holds\n"
    file.write_text("losses = [1.0]\nlast_loss = losses[-1]\n")
    assert words.main([str(tmp_path)]) == 0


def list_commands() -> list[str]:
    """List the module and arguments of the pages' commands of toybox, benchmarks and tools."""
    commands = set()
    for page in (*Path("docs").glob("*.md"), *Path().glob("*/README.md"), *Path().glob("*.md")):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        commands.update(re.findall(r"-m ((?:toybox|benchmarks|tools)\.[\w.]+ [^\n`#]+)", text))
    return sorted(command.strip() for command in commands)


@pytest.mark.slow
@pytest.mark.parametrize("command", list_commands())
def test_a_command_in_the_docs_is_parsed_by_its_module(command, monkeypatch):
    class ParsedError(Exception):
        pass

    parse_args = argparse.ArgumentParser.parse_args

    def stop_after_parsing(parser, *arguments):
        parse_args(parser, *arguments)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after_parsing)
    module, *arguments = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(ParsedError):
        runpy.run_module(module, run_name="__main__")
