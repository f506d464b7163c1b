"""The notebook of the three ways: its cells run one after the other on the embedded base."""

import ast
import json
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = json.loads((ROOT / "notebooks" / "three_ways.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


SHORTER = {
    "STEPS = 240": "STEPS = 4",
    '"--max_train_steps": str(STEPS),': '"--max_train_steps": str(STEPS), '
    '"--num_validation_images": "1",',
    "num_images=2, seed=7": "num_images=2, steps=3, seed=7",
    "num_inference_steps=25": "num_inference_steps=3",
}
"""What a cell says, and what it says in the test: fewer steps and pictures."""


def test_it_holds_programs_and_no_outputs():
    for cell in CODE:
        ast.parse(cell)
    assert len(CODE) > 5
    kept = [cell.get("outputs") or cell.get("execution_count") for cell in NOTEBOOK["cells"]]
    assert not any(kept), "clear all outputs before you commit it"


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
def test_every_cell_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    names: dict = {}
    assert all(any(words in cell for cell in CODE) for words in SHORTER)
    for cell in CODE:
        for words, fewer in (
            SHORTER | {'RUNS = Path("runs")': f"RUNS = Path({str(tmp_path)!r})"}
        ).items():
            cell = cell.replace(words, fewer)
        exec(compile(cell, "three_ways.ipynb", "exec"), names)
    assert (
        names["STEPS"] == 4
        and (tmp_path / "notebook" / "pytorch_lora_weights.safetensors").is_file()
    )
    assert names["checked"].returncode == 0 and len(names["pictures"]) == 2
    assert isinstance(names["image"], Image.Image)
