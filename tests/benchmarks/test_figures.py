"""The benchmarks that compute a table or a figure: what each says of numbers that are known."""

import json
import os
import signal
import sys

import psutil
import pytest
import torch

from benchmarks import fault_runs, one_word
from benchmarks.basis_share import share_of
from benchmarks.fast_path_table import compare
from benchmarks.mixer_motion import RANKS, first_step_difference, mixer_share, rank_share
from benchmarks.mixer_swap import measure
from benchmarks.visitors import WEIGHTS, Day, memory_figures


def test_an_update_of_the_basis_itself_is_held_and_another_is_not():
    generator = torch.Generator().manual_seed(1)
    down, up, mixer = (torch.randn(shape, generator=generator) for shape in ((4, 30), (20, 4), (4, 4)))
    inside, random, whole = share_of(up @ mixer @ down, down, up)
    assert inside == pytest.approx(whole) and random == pytest.approx(whole * 16 / 600)
    basis = torch.linalg.qr(torch.randn(30, 30, generator=generator))[0]
    inside, _, whole = share_of(up @ basis[:4], basis[4:8], up)
    assert inside < 1e-9 * whole


TO_FP64 = "PEFT to fp64"


@pytest.mark.parametrize(
    ("base", "targets", "hows"),
    [
        ("fp32", "with conv", ("plain",)),
        ("bf16", "q/k/v together", ("recomputed", "text cached")),
        pytest.param("fp16", "with conv", ("plain", "recomputed"), marks=pytest.mark.slow),
    ],
)
def test_it_differs_by_no_more_than_rounding(base, targets, hows):
    found = dict(compare(base, targets, hows))
    assert max(found[TO_FP64]) > 0
    for how in hows:
        for far, rounding in zip(found[how], found[TO_FP64]):
            assert 0 < far <= 4 * rounding, how


def test_4_bit_weights_are_those_of_pefts_layers():
    """They are packed and made dense alike: what differs is the rounding of bf16."""
    output, gradient = dict(compare("NF4", "q/k/v together", ("plain",)))["plain"]
    assert 0 < output < 0.03 and 0 < gradient < 0.3


@pytest.mark.slow
def test_8_bit_layers_keep_pefts_path():
    hows = ("plain", "recomputed")
    assert dict(compare("int8", "q/k/v together", hows)) == dict.fromkeys(hows, (0.0, 0.0))


@pytest.mark.skipif(sys.platform != "linux", reason="the faults are injected on Linux")
def test_a_ctrl_c_before_the_first_line_is_no_fault_and_a_kill_there_leaves_an_empty_log(monkeypatch, tmp_path):
    workshop = object.__new__(fault_runs.Workshop)
    workshop.base = tmp_path
    monkeypatch.setattr(fault_runs.Workshop, "arguments", lambda *_, **__: ["--help"])

    def interrupt() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist ignores it
        os.kill(os.getpid(), signal.SIGINT)

    ended = workshop.start(tmp_path, "any", before=interrupt).wait()
    assert ended.code == 130 and "Traceback" not in ended.text
    monkeypatch.setattr(fault_runs, "become_training", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    ended = workshop.start(tmp_path, "any", log="killed").wait()
    assert (ended.code, ended.text) == (-signal.SIGKILL, "")


WIDTH = 320


@pytest.mark.parametrize("rank", RANKS)
def test_the_statements_of_the_mixers_theory_hold(rank):
    assert first_step_difference(rank, WIDTH) < 1e-6, "the first step of SGD is LoRA's"
    assert mixer_share(rank, WIDTH) == pytest.approx(rank**-0.5, rel=0.25), "Adam moves the product through M by this"
    assert (rank_share("butterfly", rank), rank_share("orthogonal", rank)) == (0.5, 1)


@pytest.mark.slow
def test_a_swap_takes_a_fraction_of_loading_the_basis(tiny_base):
    found = measure(str(tiny_base), 4, 20, ["to_q", "conv1"])
    assert 0 < found["swap_ms"] < 100 * found["basis_sec"] and found["kb"] < 10


def test_a_row_a_subject_and_the_mean_with_its_interval(tmp_path, capsys):
    likeness, drift, seconds = (0.98, 0.90, 0.94), (0.5, 0.7, 0.6), (200, 220, 210)
    subjects = ("bear", "rocket", "train")
    for number, subject in enumerate(subjects):
        relative = {"dino_of_ceiling": likeness[number], "drift_of_spread": drift[number]}
        relative |= {"clip_t_of_ceiling": 1.01, "sharpness_of_ceiling": 0.9}
        judged = {"judge_colour2": {"mean": 1.0}, "judge_ornaments": {"mean": 0.75}}
        (tmp_path / subject / "evaluation").mkdir(parents=True)
        scores = json.dumps({"relative": relative, "scores": judged})
        (tmp_path / subject / "evaluation" / "scores.json").write_text(scores)
        (tmp_path / f"{subject}.json").write_text(json.dumps({"seconds": seconds[number]}))
    one_word.main(["--subjects", *subjects, "--out", str(tmp_path), "--json", str(tmp_path / "all.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| bear | 0.980 | 0.500 | 1.010 | 0.900 | 1.000 | 0.750 | 200 |"
    assert lines[5].startswith("| mean | 0.940 [0.") and lines[5].endswith("| 210 |")
    found = json.loads((tmp_path / "all.json").read_text())
    assert list(found) == list(subjects) and list(found["bear"]) == list(one_word.COLUMNS)


def test_memory_is_compared_only_since_every_action_and_every_visitor_was_seen():
    day = Day(psutil.Process(), minutes=1, steps=1)
    day.sample(clients=2)
    assert "not compared" in memory_figures(day)["memory"]
    for name in WEIGHTS:
        day.seconds[name].append(1.0)
    day.acted.add(1)
    day.sample(clients=2)
    assert day.warm_from is None
    day.acted.add(2)
    day.sample(clients=2)
    day.memory += [100.0, 100.0, 500.0, 100.0, 300.0, 102.0, 101.0, 101.0]
    figures = memory_figures(day)
    assert figures["memory since, change (%)"] == 1.0
    assert figures["memory since, 95th percentile and highest (MiB)"].endswith("500.0")
