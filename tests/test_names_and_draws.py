"""Public names, records, numbers, errors, seeds, and the program's own files."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.disk.paths import (
    find_asset,
    find_free_name,
    get_assets_folder,
    get_public_name,
)
from dreambooth_moslora.errors import UserError, escape_control_characters
from dreambooth_moslora.seeds import compute_seed, seed_generator, seed_rng, shuffle_index
from dreambooth_moslora.values import is_finite_number, is_number
from tests.helpers.command_line import parse_train_config

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Record:
    tags: tuple[str, ...]
    share: float = 0.5


def test_a_public_name_has_no_folders(tmp_path, monkeypatch):
    for name in ("stabilityai/sdxl-base-1.0", "toy", ""):
        assert get_public_name(name) == name
    for path in ("/data/me/x", "./me/x", "~nobody/x", "C:\\Users\\me\\x", Path("/data/me/x")):
        assert get_public_name(path) == "x"
    folder = tmp_path / "me" / "sdxl"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert get_public_name(".") == "sdxl"
    monkeypatch.chdir(tmp_path)
    assert get_public_name("me/sdxl") == "sdxl", "it looks like a hub id, and is a folder"


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ('{"a": 1}', dict, {"a": 1}),
        ('{"tags": ["a"], "share": 1, "new": 0}', Record, Record(("a",), 1.0)),
        ("[1]", dict, "x.json: expected names and values, found a list."),
        ("{", dict, "x.json: it is not valid JSON: "),
        ("[" * 100_000, dict, "x.json: it is not valid JSON: "),
        ("[" * 100_000, Record, "x.json: Invalid JSON: recursion limit"),
        ('{"tags": ["a", 3]}', Record, "x.json: tags.1: Input should be a valid string."),
        ('{"tags": [], "share": true}', Record, "x.json: share: Input should be a valid number."),
        ("{}", Record, "x.json: tags: Field required."),
        (b"\xff", dict, "x.json: it is not a text file."),
        (None, dict, "x.json: there is no such file."),
    ],
)
def test_a_record_is_read_or_its_first_wrong_value_is_named(text, kind, expected, tmp_path):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if not isinstance(expected, str):
        assert read_json(path, kind) == expected
        return
    with pytest.raises(UserError) as caught:
        read_json(path, kind)
    assert expected in str(caught.value)


def test_the_first_free_name():
    is_taken = {"dog", "dog_2", "dog_1"}.__contains__
    assert find_free_name("cat", is_taken) == "cat"
    assert find_free_name("dog", is_taken) == "dog_3"
    assert find_free_name("dog", is_taken, "-") == "dog-2"
    assert find_free_name("dog", is_taken, is_numbered=True) == "dog_3"
    assert find_free_name("cat", is_taken, is_numbered=True) == "cat_1"


def test_characters_that_change_text_direction_are_escaped():
    """`gpj.exe` behind U+202E reads as `exe.jpg` on a terminal."""
    turned = "a\u202egpj.exe\u2069 \u200fa\x1b[0m\x85\r"
    assert escape_control_characters(turned) == r"a\u202egpj.exe\u2069 \u200fa\x1b[0m\x85\x0d"
    text = "café 雪 шар כלב 👩\u200d🚀\n\t"
    assert escape_control_characters(text) == text


@pytest.mark.parametrize(
    ("values", "are_numbers", "are_finite"),
    [
        ((0, -3, 0.5, 1e308), True, True),
        ((math.nan, math.inf, -math.inf, 10**400), True, False),
        ((True, False, "1", None, [1]), False, False),
    ],
)
def test_a_bool_is_no_number_and_infinity_is_not_finite(values, are_numbers, are_finite):
    assert {is_number(value) for value in values} == {are_numbers}
    assert {is_finite_number(value) for value in values} == {are_finite}


def test_seeds_depend_on_every_name_and_on_nothing_else():
    seeds = {
        compute_seed(*names)
        for names in ((0, "noise", 1), (0, "noise", 2), (1, "noise", 1), (0, "crop", 1))
    }
    assert len(seeds) == 4
    first, second = (torch.randn(4, generator=seed_generator(7, "a")) for _ in range(2))
    assert torch.equal(first, second)
    assert seed_rng(7, "a").random() == seed_rng(7, "a").random()
    assert (
        compute_seed("ab", "c") != compute_seed("a", "bc")
        and compute_seed(7, "crop", 3) == 2131499920990350508
    )


def test_each_epoch_has_every_sample_once_in_a_new_order():
    backwards = [shuffle_index(index, 5, 0, "instance") for index in reversed(range(15))]
    samples = [shuffle_index(index, 5, 0, "instance") for index in range(15)]
    assert samples == backwards[::-1]
    orders = [tuple(samples[start : start + 5]) for start in (0, 5, 10)]
    for epoch, order in enumerate(orders):
        assert sorted(order) == [(epoch, position) for position in range(5)]
    assert len({tuple(position for _, position in order) for order in orders}) > 1


def test_assets_are_found_from_any_folder(tmp_path, monkeypatch):
    """In a clone, assets lie beside the package."""
    assert get_assets_folder() == ROOT / "assets"
    assert Base.find("toy").folder == ROOT / "assets" / "toy-sdxl"
    monkeypatch.chdir(tmp_path)
    config = parse_train_config(["--config", "assets/configs/quickstart.toml"])
    assert Path(config.instance_data_dir) == ROOT / "assets" / "subjects" / "rocket"
    assert config.output_dir == "runs/rocket"
    (tmp_path / "assets" / "subjects" / "rocket").mkdir(parents=True)
    assert find_asset("assets/subjects/rocket") == "assets/subjects/rocket"
    assert find_asset("assets/subjects/bear") == str(ROOT / "assets" / "subjects" / "bear")
    monkeypatch.setenv("HOME", "/home/ann")
    for path in ("assets/none", "./photos/dog/", "/assets/subjects/rocket", "x" * 5000):
        assert find_asset(path) == path
    assert find_asset("~/dog") == "/home/ann/dog"
