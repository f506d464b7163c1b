"""The picture of several runs shows each one's photo and what its adapter draws."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tools import subject_sheet


@pytest.mark.slow
def test_a_run_is_a_row_of_a_photo_and_four_unlike_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(subject_sheet, "STEPS", 2)
    run = tmp_path / "rocket"
    run.mkdir()
    shutil.copy("assets/adapters/rocket.safetensors", run / "pytorch_lora_weights.safetensors")
    settings = {"instance_data_dir": "assets/subjects/rocket", "instance_prompt": "a photo of a sks rocket"}
    (run / "train_config.json").write_text(json.dumps(settings))
    (row,) = subject_sheet.rows([run])
    drawn = [np.asarray(image) for image in row.images[1:]]
    assert row.title == "rocket" and row.images[0].size == (512, 512) and len(drawn) == 4
    assert all((one != other).any() for number, one in enumerate(drawn) for other in drawn[:number])
    subject_sheet.main([str(run), "--out", str(tmp_path / "sheet.jpg")])
    assert Image.open(tmp_path / "sheet.jpg").width > 5 * 128
