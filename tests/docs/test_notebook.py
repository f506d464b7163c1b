"""The notebook: its cells run one after the other on the embedded base."""

import ast
import json
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = json.loads((ROOT / "notebooks" / "three_ways.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


SHORTER = {
    "max_train_steps=240": "max_train_steps=4, num_validation_images=1, evaluate_steps=0",
    "seed=7, adapters": "seed=7, steps=3, adapters",
    "num_inference_steps=25": "num_inference_steps=3",
}
"""What a cell says, and what it says in the test: fewer steps and pictures."""


def test_it_has_three_programs_and_no_outputs():
    """Of its eleven cells four started processes and opened sockets."""
    for cell in CODE:
        ast.parse(cell)
    assert len(CODE) == 3 and not any("subprocess" in cell or "socket" in cell for cell in CODE)
    outputs = [cell.get("outputs") or cell.get("execution_count") for cell in NOTEBOOK["cells"]]
    assert not any(outputs), "clear all outputs before you commit it"


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
def test_every_cell_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    names: dict = {}
    assert all(any(code in cell for cell in CODE) for code in SHORTER)
    for cell in CODE:
        for code, fewer in SHORTER.items():
            cell = cell.replace(code, fewer)
        cell = cell.replace("base=BASE, ", f"base=BASE, output_dir={str(tmp_path / 'run')!r}, ")
        exec(compile(cell, "three_ways.ipynb", "exec"), names)
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
    assert isinstance(names["pictures"][0].pixels, Image.Image)
    assert isinstance(names["image"], Image.Image)
