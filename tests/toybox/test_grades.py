"""Sheets for graders who do not know who drew what, and the means of their grades."""

import json
import shutil
from collections import Counter

import pytest

from dreambooth_moslora.disk.paths import get_assets_folder
from dreambooth_moslora.disk.run_folder import RunDir
from toybox.measures import grades


def test_the_mean_of_each_source_is_over_all_graders(tmp_path, capsys):
    sources = {1: "renders", 2: "new", 3: "new"}
    numbered = {
        number: grades.GradedImage(by, "a photo of a bear", None) for number, by in sources.items()
    }
    grades.write_key(numbered, tmp_path)
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    files[0].write_text('{"1": 5, "2": 2, "3": 3}')
    files[1].write_text('{"1": 4, "2": 3, "3": 3}')
    grades.main(["mean", str(tmp_path), *map(str, files)])
    assert capsys.readouterr().out.splitlines() == [
        'renders {"mean": 4.5, "lowest": 4, "highest": 5}',
        'new {"mean": 2.75, "lowest": 2, "highest": 3}',
        "two graders differ by 0.67 on a picture",
    ]
    files[1].write_text('{"1": 4, "2": 3}')
    with pytest.raises(ValueError, match="no grade for 3"):
        grades.compute_means(tmp_path, files)


@pytest.mark.slow
def test_adapters_images_are_mixed_with_renders_of_their_places(tmp_path):
    run = tmp_path / "runs" / "rocket"
    run.mkdir(parents=True)
    shutil.copy(get_assets_folder() / "adapters" / "rocket.safetensors", RunDir(run).adapter_path)
    grades.main(["adapters", str(tmp_path / "out"), "--runs", f"new={run.parent}"])
    key = json.loads((tmp_path / "out" / "key.json").read_text())
    prompts = {f"a photo of a sks rocket {place}" for place in grades.PLACES}
    for by in ("renders", "new"):
        assert {entry["prompt"] for entry in key.values() if entry["by"] == by} == prompts
    assert Counter(entry["by"] for entry in key.values()) == {"renders": 4, "new": 4}
    assert (tmp_path / "out" / "sheet_rocket.png").is_file()
