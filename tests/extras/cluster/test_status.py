"""How a fleet stands, from files alone: the lines of `fleet status`, and the page for a person's eye."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.extras.cluster.records import (
    Record,
    read_record,
    rows_of,
    status_lines,
    without_paths,
    write_index,
    write_names,
    write_record,
)

START = {"type": "start", "time": 1.0, "max_train_steps": 9}
STEP = {"type": "step", "time": 2.0, "step": 4, "loss": 0.1}


def scored(dino: float, **more) -> dict:
    return {"type": "evaluation", "time": 3.0, "step": 4, "dino": dino, **more}


def subject(out: Path, name: str, record: Record, *events: dict, words: str = "a photo of a sks dog") -> Path:
    run_dir = out / name
    run_dir.mkdir()
    write_record(run_dir, record)
    (run_dir / "job_config.json").write_text(json.dumps({"instance_prompt": words}))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run_dir


@pytest.fixture
def fleet(tmp_path) -> Path:
    out = tmp_path / "my fleet"
    out.mkdir()
    done = Record("done", "m", seconds=36.0, hours=0.5, unit="GPU")
    subject(out, "fine", done, START, STEP, scored(0.8))
    subject(out, "unlike", done, START, STEP, scored(0.3))
    sheet = subject(out, "copied", done, START, STEP, scored(0.9, copied=0.5, copy_alarm=True)) / "contact_sheet.png"
    Image.new("RGB", (1000, 700), "red").save(sheet)
    subject(out, "halfway", Record("running", "m", hours=0.25), START, STEP)
    subject(out, "<b>bad", Record("failed", message=f"no usable photo in {tmp_path}/our pets/bad: it is <empty>."))
    write_names(out, ["fine", "unlike", "waiting", "copied", "halfway", "<b>bad"])
    return out


def test_what_needs_an_eye_comes_first(fleet):
    assert [row.name for row in rows_of(fleet)] == ["<b>bad", "halfway", "waiting", "copied", "unlike", "fine"]


def test_the_status_counts_and_costs_and_names_who_stands_out(fleet):
    first, cost, *others = status_lines(rows_of(fleet))
    assert first == "6 subjects: 1 failed, 1 running, 1 waiting, 3 done"
    assert cost == "cost so far: 1.50 GPU-hours, 0.25 CPU-hours"
    assert any(line == "halfway: running, step 4 of 9" for line in others)
    assert any(line.startswith("copied: done, step 4 of 9: 50% of the pictures repeat a photo") for line in others)
    assert not any(line.startswith(("fine", "waiting")) for line in others)


def test_the_page_shows_no_path_and_no_markup_of_others(fleet):
    html = write_index(fleet, rows_of(fleet)).read_text(encoding="utf-8")
    assert str(fleet.parent) not in html and "our pets" not in html
    assert "no usable photo in bad: it is &lt;empty&gt;." in html and "&lt;b&gt;bad" in html and "<b><b>" not in html
    assert html.count("data:image/jpeg") == 1 and 'href="copied/contact_sheet.png"' in html
    assert "0.800" in html and "<script" not in html
    assert html.index("&lt;b&gt;bad") < html.index("copied") < html.index("unlike") < html.index("0.800")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no photo in /home/me/our pets/rex: it is empty", "no photo in rex: it is empty"),
        (r"C:\Users\me\rex (unreadable)", "rex (unreadable)"),
        ("stabilityai/sdxl is not here; use it and/or 1/2", "stabilityai/sdxl is not here; use it and/or 1/2"),
    ],
)
def test_paths_lose_all_but_their_last_part(text, shown, tmp_path):
    assert without_paths(text, tmp_path) == shown


def test_status_is_a_command_and_a_folder_without_a_fleet_is_a_mistake(fleet, capsys):
    assert main(["fleet", "status", str(fleet)]) == 0
    assert "6 subjects" in capsys.readouterr().out and (fleet / "index.html").is_file()
    assert main(["fleet", "status", str(fleet / "fine")]) == 2
    assert "names no subjects" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"state": 3}', '{"state": "done", "more": 1}', '{"state": "done", "starts": "x"}']
)
def test_a_damaged_record_is_none(text, tmp_path):
    (tmp_path / "fleet.json").write_text(text)
    assert read_record(tmp_path) is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pets"], "missing: --out"),
        (["s3://pets", "--out", "x"], "mount the bucket"),
        (["pets", "more", "--out", "x"], "`more` belongs to no flag"),
        (["pets", "--out", "x"], "missing: --pretrained_model_name_or_path"),
        (["pets", "--out", "x", "--network_dim", "4"], "use --rank"),
        (["pets", "--out", "x", "--max_train_step", "4"], "did you mean --max_train_steps"),
        (["pets", "--out", "x", "--pretrained_model_name_or_path", "toy", "--output_dir", "y"], "--output_dir"),
        (["pets", "--out", "x", "--per_gpu", "0"], "--per_gpu"),
        (["pets", "--out", "x", "--cpus", "0"], "--cpus"),
        (
            ["pets", "--out", "gs://x", "--per_gpu", "2", "--pretrained_model_name_or_path", "toy"],
            "--per_gpu 2: subjects that share a process need an --out that is a folder",
        ),
        (["pets", "--out", "gs://x", "--pretrained_model_name_or_path", "toy"], "pets: give a folder of subject"),
    ],
)
def test_a_mistake_is_one_line_and_told_before_a_missing_library(words, says, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert main(["fleet", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
