"""Names that may be shown, and names that are still free."""

from pathlib import Path

import pytest

from dreambooth_moslora.core.names import free_name, public_name


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("stabilityai/sdxl-base-1.0", "stabilityai/sdxl-base-1.0"),
        ("toy", "toy"),
        ("", ""),
        ("/data/me/x", "x"),
        ("./me/x", "x"),
        ("~nobody/x", "x"),
        ("C:\\Users\\me\\x", "x"),
        (Path("/data/me/x.safetensors"), "x.safetensors"),
    ],
)
def test_a_public_name_holds_no_path(name, public):
    assert public_name(name) == public


def test_a_folder_here_is_called_by_its_own_name(tmp_path, monkeypatch):
    folder = tmp_path / "me" / "sdxl"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert public_name(".") == "sdxl"
    monkeypatch.chdir(tmp_path)
    assert public_name("me/sdxl") == "sdxl", "it looks like a hub id, and is a folder"


def test_the_first_free_name():
    taken = {"dog", "dog_2", "dog_1"}
    assert free_name("cat", taken.__contains__) == "cat"
    assert free_name("dog", taken.__contains__) == "dog_3"
    assert free_name("dog", taken.__contains__, "-") == "dog-2"
    assert free_name("dog", taken.__contains__, is_numbered=True) == "dog_3"
    assert free_name("cat", taken.__contains__, is_numbered=True) == "cat_1"
