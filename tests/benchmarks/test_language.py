"""The language benchmark: its tasks' answers, its tables, and that it goes on where it was."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from benchmarks import language
from benchmarks.language_report import Cell, accuracies, differences, write_report
from benchmarks.language_tasks import KNOWN, NO_LABEL, SHIFTED, TUNING, draw
from dreambooth_moslora.adapters.moslora import mixer_parameters

STRING = torch.tensor([[4, 1, 7, 1, 0, 9]])
ANSWERS = {
    "sort": [0, 1, 1, 4, 7, 9],
    "add": [5, 1, 6],
    "subtract": [3, 1, 8],
    "total": [4, 5, 2, 3, 3, 2],
    "lookup": [0, 1, 1, 1, 4, 1],
    "reverse, then next": [0, 1, 2, 8, 2, 5],
    "permuted letters": [15, 17, 12, 17, 13, 14],
    "rotate, permuted letters": [17, 12, 17, 13, 14, 15],
    "lowest so far": [4, 1, 1, 1, 0, 0],
    "lookup into letters": [10, 11, 11, 11, 14, 11],
    "highest, then next": [5, 5, 8, 8, 8, 0],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_task_gives_its_answer(name):
    assert (KNOWN | SHIFTED | TUNING)[name].answer(STRING).tolist() == [ANSWERS[name]]


def test_every_shifted_task_contradicts_the_known_one_of_its_token():
    for name, task in (SHIFTED | TUNING).items():
        shifted, known = (draw(t, 200, torch.Generator().manual_seed(0)) for t in (task, KNOWN[task.token]))
        assert shifted[0][:, :8].equal(known[0][:, :8]), name
        assert (shifted[1] == known[1]).all(dim=1).float().mean() < 0.15, name
    inputs, labels = draw(KNOWN["add"], 5, torch.Generator().manual_seed(0))
    assert inputs.shape == (5, 13) and (labels[:, 3:] == NO_LABEL).all() and (labels[:, :3] >= 0).all()


def made_cells(seeds: int) -> list[Cell]:
    """The arm "ours" is 0.1 better than LoRA on the one task and 0.2 on the other."""
    return [
        Cell(arm, task, seed, 0.01, 0.5 + 0.05 * seed + gain * (arm == "ours"), 100, 1.0)
        for seed in range(seeds)
        for task, gain in (("one", 0.1), ("two", 0.2))
        for arm in ("LoRA", "ours")
    ]


def test_the_difference_is_taken_cell_by_cell_and_spread_shared_by_arms_cancels():
    found = differences(accuracies(made_cells(3)))["ours"]["tasks and seeds"]
    assert found["mean"] == pytest.approx(0.15)
    assert found["low"] < 0.1 and found["high"] > 0.2  # two tasks say little


def test_a_seed_that_is_not_whole_does_not_count(tmp_path):
    cells = made_cells(3)[:-1]
    assert accuracies(cells)["LoRA"].shape == (2, 2)
    bounds, curves = {"frozen base": {"one": 0.0, "two": 0.1}}, {"LoRA": {0.01: 0.5, 0.02: 0.4}}
    text = write_report(tmp_path, {"rank": 8}, bounds, curves, cells)
    assert "| frozen base |  |  | 0.0 | 10.0 | 5.0 |" in text and "| LoRA | 0.01 | 0.01: 50.0, 0.02: 40.0 |" in text
    assert "| ours | 100 | 0.01 | 62.5 | 72.5 | 67.5 |" in text and "2 seeds" in text
    assert json.loads((tmp_path / "results.json").read_text())["differences"]["ours"]["tasks"]["mean"] == 0.15
    assert "no seed is whole" in write_report(tmp_path, {}, {}, {}, cells[:3])


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    for name, value in {"WIDTH": 16, "LAYERS": 1, "HEADS": 2, "TESTS": 8, "BATCH": 4}.items():
        monkeypatch.setattr(language, name, value)
    return language.Plan(tmp_path, rank=2, seeds=1, base_steps=2, steps=0.0, arms=("LoRA", "orthogonal"))


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_where_it_was(tiny):
    cut = language.run(tiny, deadline=0.0)
    assert "no seed is whole" in cut
    before = {path: path.read_bytes() for path in (tiny.out / "cells").iterdir()}
    assert before and not (tiny.out / "table.md").exists()
    text = language.run(tiny, deadline=float("inf"))
    assert all(path.read_bytes() == content for path, content in before.items())
    again = {path: path.stat().st_mtime_ns for path in (tiny.out / "cells").iterdir()}
    assert language.run(tiny, deadline=float("inf")) == text
    assert again == {path: path.stat().st_mtime_ns for path in (tiny.out / "cells").iterdir()}


def test_a_best_rate_at_the_edge_widens_the_grid(tiny, monkeypatch):
    def cell(base, plan, arm, task, seed, rate):
        return Cell(arm, task, seed, rate, 1 / (1 + abs(np.log2(rate / 0.064))), 1, 0.0)

    monkeypatch.setattr(language, "adapt", cell)
    best, curve = language.chosen_rate(None, tiny, "LoRA")
    assert best == pytest.approx(0.064) and min(curve) < best < max(curve)


@pytest.mark.slow
def test_an_arm_trains_what_it_says(tiny):
    base = language.new_model().requires_grad_(False)
    for name, arm in (language.ARMS | language.FURTHER).items():
        model = language.copy.deepcopy(base)
        if not arm.full:
            language.inject(model, arm.config(2, 0))
        groups = language.trained_groups(model, arm, 1.0)
        trained = {id(p) for group in groups for p in group["params"]}
        assert trained == {id(p) for p in model.parameters() if p.requires_grad}, name
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        if arm.mixer != "none" and arm.train_mixer:
            assert {rates[id(p)] for _, p in mixer_parameters(model)} == {arm.mixer_lr_scale}


@pytest.mark.slow
def test_arms_share_the_start_of_a_and_the_examples(tiny):
    (tiny.out / "cells").mkdir()
    base = language.learn_base(dataclasses.replace(tiny, base_steps=1))
    cells = [language.adapt(base, tiny, arm, "sort downward", 0, 0.0) for arm in ("LoRA", "orthogonal")]
    assert cells[0].accuracy == cells[1].accuracy and cells[1].parameters - cells[0].parameters == 7 * 2**2
