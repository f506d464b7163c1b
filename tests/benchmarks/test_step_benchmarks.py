"""The benchmarks run, and their arithmetic is right; what they measure is not asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from benchmarks import bundle, first_half_hour, flow_step, gpu_step
from benchmarks.diffusers_style_loop import build_diffusers_style_step
from benchmarks.floor_ratio import measure
from benchmarks.host_peak import build_command
from benchmarks.random_sdxl import build_random_sdxl
from benchmarks.train_step import compute_ratios, read_cpu_flags
from dreambooth_moslora.training.loop import train
from tests.helpers.command_line import parse_train_config
from tests.helpers.tiny_training import paint_photos, tiny_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_quick_form_steps_the_trainers_own_learner(tmp_path):
    report = tmp_path / "step.json"
    arms = ["--arms", "ours", "--warmup", "0", "--steps", "1"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.train_step",
        "--quick",
        *arms,
        "--json",
        str(report),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [result] = json.loads(report.read_text())["results"]
    assert result["arm"] == "ours" and result["step_sec"] > 0 and result["peak_gb"] > 0, done.stderr
    assert 0 < result["loss"] < 10 and result["grad_norm"] > 0
    assert "peak GB" in done.stdout


def test_our_step_and_the_floor_take_turns_on_the_same_weights():
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(mixed_precision="no", cpu=True)  # as an earlier training in this process
    measured = measure("small", 64, rank=2, warmup=0, steps=2)
    assert len(measured["clock_ratios"]) == 2 and measured["clock_ratio"] > 0
    assert measured["floor_sec"] > 0 and measured["gradients_sec"] > measured["update_sec"] > 0
    assert measured["flags"] == read_cpu_flags()


def test_the_commands_whose_peak_is_measured_are_trainings(tmp_path):
    command = build_command("recomputed", tmp_path / "base", tmp_path, 64, 2)
    config = parse_train_config(command[2:])
    assert config.gradient_checkpointing and config.max_train_steps == 2
    assert len(list((tmp_path / "photos").iterdir())) == 3


def test_the_loop_in_diffusers_style_learns_in_either_dtype():
    for fp32_adapter in (False, True):
        step = build_diffusers_style_step("small", 64, 2, True, fp32_adapter)
        losses = []
        for _ in range(6):
            torch.manual_seed(1)  # the same noise and timestep in each step
            losses.append(step()[0])
        assert losses[-1] < 0.99 * losses[0]  # 0.976 was seen


def test_the_trainer_takes_the_random_base(tmp_path):
    build_random_sdxl("small").save_pretrained(tmp_path / "base")
    photos = paint_photos(tmp_path / "photos")
    config = tiny_config(
        tmp_path / "base", photos, tmp_path / "run", max_train_steps=2, mixed_precision="bf16"
    )
    proof = train(config).proof
    assert (
        proof.projections > 0 and (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
    )


def test_ratios_pair_arms_of_one_resolution():
    results = [
        {"arm": "floor", "resolution_px": 512, "step_sec": 4.0, "peak_gb": 7.0},
        {"arm": "ours", "resolution_px": 512, "step_sec": 4.2, "peak_gb": 7.7},
        {"arm": "diffusers-checkpointing", "resolution_px": 512, "step_sec": 12.0, "peak_gb": 14.0},
        {"arm": "floor", "resolution_px": 1024, "step_sec": 1.0, "peak_gb": 1.0},
    ]
    table = compute_ratios(results, 512)
    assert table["ours / floor"] == {"step_sec": 1.05, "cpu_sec": None, "peak_gb": 1.1}
    assert table["ours / diffusers-checkpointing"]["step_sec"] == 0.35
    assert "ours / diffusers" not in table and compute_ratios(results, 1024) == {}


SMALL = ["--size", "small", "--resolution", "64", "--steps", "1", "--rank", "2"]
GPU_ARMS = ["floor", "ours", "peft", "nf4", "channels_last", "ours --prior"]


@pytest.mark.parametrize("arguments", GPU_ARMS)
def test_the_gpu_arms_step_on_any_device(arguments, capsys):
    arm, *options = arguments.split()
    gpu_step.main([*SMALL, "--arms", arm, *options])
    result = json.loads(capsys.readouterr().out)
    assert result["arm"] == arm and 0 < result["host_sec"] <= result["step_sec"]


def test_an_arm_that_fails_is_one_line_and_the_next_follows(capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_step, "build_trainer_step", fail)
    gpu_step.main([*SMALL, "--arms", "ours", "floor"])
    ours, floor = map(json.loads, capsys.readouterr().out.splitlines())
    assert ours["arm"] == "ours" and ours["error"] and floor["step_sec"] > 0


FLOWS = [
    ("Z-Image", "recompute", ["ours", "peft", "stateful"]),
    ("Z-Image", "stream", ["ours"]),
    ("FLUX.1 dev", "nf4", ["ours"]),
    ("FLUX.2 klein 4B", "full", ["ours"]),
    ("Qwen-Image", "recompute", ["ours"]),
    ("Krea 2", "recompute", ["ours"]),
]


@pytest.mark.parametrize(("model", "plan", "arms"), FLOWS)
def test_a_flow_family_steps_on_any_device(model, plan, arms, capsys):
    flow_step.main([*SMALL, "--model", model, "--plan", plan, "--arms", *arms])
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["arm"] for result in results] == arms
    assert all(0 < result["host_sec"] <= result["step_sec"] for result in results)


@pytest.mark.parametrize("section", [section.name for section in first_half_hour.SECTIONS])
def test_each_section_of_the_first_half_hour_runs_small_once(section, tmp_path, capsys):
    arguments = ["--size", "small", "--sections", section, "--minutes", "30"]
    arguments += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    first_half_hour.main(arguments)
    results = json.loads((tmp_path / "out" / "first_half_hour.json").read_text())["results"]
    rows = [row for result in results for row in result["rows"]]
    assert [row for row in rows if "error" in row] == []
    assert all(result["rows"] for result in results)

    # Streamed, a step computes the same.
    if section == "streaming":
        losses = {(row["model"], row["plan"]): row["loss"] for row in rows}
        assert losses["Z-Image", "stream"] == losses["Z-Image", "recompute"]
        assert losses["Z-Image", "nf4_stream"] == losses["Z-Image", "nf4"]

    # The page shows it, and a second call finds nothing left.
    page = (tmp_path / "out" / "first_half_hour.md").read_text()
    assert f"## {section}" in page
    capsys.readouterr()
    first_half_hour.main(arguments)
    assert capsys.readouterr().out.startswith("nothing is left")


def test_the_clock_ends_a_command_and_its_rows_stay(tmp_path):
    result = first_half_hour.run("gpu_memory", tmp_path, limit_sec=0.1)
    assert "ended by the clock" in result["rows"][-1]["error"]


def test_a_bundle_can_be_carried_and_says_which_wheels_it_lacks(tmp_path):
    file = tmp_path / "bundle.tar.xz"
    bundle.make_bundle(file, remote_packages=None, wheels=None)
    assert file.stat().st_size < 60 * 2**20
    assert any(
        name.startswith("diffusers==") for name in bundle.list_missing_packages({"torch": "2.11.0"})
    )
    has = {"torch": "2.11.0", "torchvision": "0.26.0"}
    assert not any(name.startswith("torch==") for name in bundle.list_missing_packages(has))
