"""The tables for those who come from another trainer say what the program itself answers to that trainer's flags."""

import re
from pathlib import Path

import pytest

from dreambooth_moslora.cli.main import train_main
from dreambooth_moslora.cli.parser import FOREIGN_FLAGS, REMOVED_FLAGS, unknown_flag_message
from dreambooth_moslora.settings.table import SETTINGS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("from_diffusers.md", "from_kohya.md", "from_onetrainer.md")
SAME, NONE = "the same", "–"
SPAN = re.compile(r"`([^`]+)`")
HEAD = re.compile(r"^\| [^|]+ \| here \| remark \|\n\|[-|]+\|\n((?:\|.*\n)+)", re.MULTILINE)


def rows(page: str) -> list[tuple[list[str], str, str]]:
    """(their names, ours, remark) of each row of the page's tables."""
    found = []
    for table in HEAD.findall((DOCS / page).read_text(encoding="utf-8")):
        for line in table.splitlines():
            theirs, ours, remark = (cell.strip() for cell in line.strip("|").split("|"))
            found.append((SPAN.findall(theirs), ours, remark))
    return found


ROWS = [(page, *row) for page in PAGES for row in rows(page)]
OF_FLAGS = [row for row in ROWS if row[0] != "from_onetrainer.md"]


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"--(\w+)", text)) & SETTINGS.keys()


def wrong(names: list[str], ours: str) -> list[str]:
    """What a row says that is not so: the same name that is no setting, another name where the name is one of ours."""
    if ours == SAME:
        return [name for name in names if name not in SETTINGS]
    if ours == NONE:
        return [name for name in names if name in SETTINGS]
    return [] if "`--" in ours else names


def test_the_tables_were_found():
    assert {page: len(rows(page)) > 40 for page in PAGES} == dict.fromkeys(PAGES, True)


@pytest.mark.parametrize("page", PAGES)
def test_the_same_name_is_a_setting_and_a_dash_is_none(page):
    assert [(names, ours) for names, ours, _ in rows(page) if wrong(names, ours)] == []
    assert wrong(["network_dim"], SAME) and wrong(["rank"], NONE) and wrong(["network_dim"], "`rank`")


def test_a_row_names_what_the_program_answers_to_that_flag():
    said: dict[str, set[str]] = {}
    for _, names, ours, remark in OF_FLAGS:
        for name in FOREIGN_FLAGS.keys() & set(names):
            said.setdefault(name, set()).update(flags_in(ours + remark))
    assert len(said) > 60
    assert {name for name, flags in said.items() if flags_in(FOREIGN_FLAGS[name]) - flags} == set()


def test_each_flag_that_the_program_answers_has_a_row():
    named = {name for _, names, _, _ in OF_FLAGS for name in names}
    assert set(FOREIGN_FLAGS) - set(REMOVED_FLAGS) - named == set()


def test_a_flag_of_another_program_ends_with_one_line_that_names_ours(capsys):
    assert train_main(["--network_dim", "16"]) == 2
    assert capsys.readouterr().err.strip() == f"error: {unknown_flag_message('--network_dim')}"


def test_a_preset_of_onetrainer_is_refused_by_its_first_name(tmp_path, capsys):
    (tmp_path / "preset.json").write_text('{"training_method": "LORA", "lora_rank": 16}')
    assert train_main(["--config", str(tmp_path / "preset.json")]) == 2
    assert "training_method" in capsys.readouterr().err
