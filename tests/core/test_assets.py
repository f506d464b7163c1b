"""The program's own files are found from any folder, and a person's own go first."""

from pathlib import Path

from dreambooth_moslora.base.files import resolve_base
from dreambooth_moslora.cli.parser import parse_train_config
from dreambooth_moslora.core.names import assets_folder, find_asset

ROOT = Path(__file__).parents[2]


def test_assets_lie_beside_the_package_in_a_clone():
    assert assets_folder() == ROOT / "assets"
    assert resolve_base("toy") == ROOT / "assets" / "toy-sdxl"


def test_a_recipe_and_its_photos_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_train_config(["--config", "assets/configs/quickstart.toml"])
    assert Path(config.instance_data_dir) == ROOT / "assets" / "subjects" / "rocket"
    assert config.output_dir == "runs/rocket"


def test_what_is_here_goes_before_the_programs_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets" / "subjects" / "rocket").mkdir(parents=True)
    assert find_asset("assets/subjects/rocket") == "assets/subjects/rocket"
    assert find_asset("assets/subjects/bear") == str(ROOT / "assets" / "subjects" / "bear")


def test_other_paths_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ann")
    for path in ("assets/none", "./photos/dog/", "/assets/subjects/rocket", "x" * 5000):
        assert find_asset(path) == path
    assert find_asset("~/dog") == "/home/ann/dog"
