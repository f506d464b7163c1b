"""Lists of subjects as people write them, who of them is missing, and how a fleet stands."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.cluster import command_fleet, records
from dreambooth_moslora.extras.cluster.fleet import list_unfinished
from dreambooth_moslora.extras.cluster.fleet_subjects import digest_run, read_subjects
from dreambooth_moslora.extras.cluster.records import (
    Record,
    load_rows,
    read_record,
    write_names,
    write_record,
)
from tests.helpers.changed_base import flip_last_bit


@pytest.fixture
def pets(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, word in (("rex", "dog"), ("tom", "cat")):
        folder = tmp_path / "pets" / name
        folder.mkdir(parents=True)
        (folder / "subject.json").write_text(json.dumps({"token": "sks", "class_word": word}))
        (folder / "0.png").write_bytes(b"photo")
    return tmp_path / "pets"


def read(source, out="out", **shared):
    return read_subjects(
        Path(source), {"resolution": 64, "max_train_steps": 3, **shared}, Path(out)
    )


def test_a_folder_of_folders_is_a_fleet(pets):
    (pets / ".hidden").mkdir()
    (pets / "notes.txt").write_text("no folder")
    rex, tom = read(pets, instance_prompt="a photo of sks thing")
    assert (rex.name, tom.name) == ("rex", "tom") and not rex.error
    assert rex.settings["instance_prompt"] == "a photo of a sks dog"
    assert tom.settings["class_prompt"] == "a photo of a cat"
    assert rex.settings["output_dir"] == str(Path("out/rex")) and rex.settings["resolution"] == 64


LISTS = {
    "a.csv": "folder,token,class,name,max_train_steps\npets/rex,ohwx,dog,best boy,7\n"
    "pets/tom,,,,\n",
    "a.jsonl": '{"folder": "pets/rex", "token": "ohwx", "class": "dog", "name": '
    '"best boy", "max_train_steps": 7}\n\n'
    '{"folder": "pets/tom"}\n',
    "a.toml": '[[subjects]]\nfolder = "pets/rex"\ntoken = "ohwx"\nclass = "dog"\n'
    'name = "best boy"\n'
    'max-train-steps = 7\n[[subjects]]\nfolder = "pets/tom"\n',
}


@pytest.mark.parametrize("name", LISTS)
def test_every_kind_of_list_says_the_same(name, pets):
    Path(name).write_text(LISTS[name], encoding="utf-8")
    best, tom = read(name)
    assert best.name == "best boy" and int(best.settings["max_train_steps"]) == 7
    assert best.settings["instance_prompt"] == "a photo of a ohwx dog"
    assert (
        tom.settings["instance_prompt"] == "a photo of a sks cat"
        and tom.settings["max_train_steps"] == 3
    )


def test_a_small_base_has_its_own_resolution_in_a_fleet_too(pets, monkeypatch):
    """All bases were trained at 1024 px: a step of the toy took twenty seconds."""
    shared = []
    monkeypatch.setattr(
        command_fleet, "read_subjects", lambda _, settings, out: shared.append(settings) or []
    )
    base = ["--pretrained_model_name_or_path", "toy"]
    assert main(["fleet", str(pets), "--out", "out", *base, "--dry_run"]) == 0
    assert main(["fleet", str(pets), "--out", "out", *base, "--resolution", "64", "--dry_run"]) == 0
    assert [int(settings["resolution"]) for settings in shared] == [128, 64]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("nowhere,dog,", "no such folder"),
        ("pets/tom,cat,-3", "--max_train_steps -3: must be at least 1"),
        ("bare,,", "does not say what it shows"),
        (f"pets/tom,{'d' * 61},", "is no word: give at most 60 letters"),
        ("pets/tom,a\u202eb,", "the class 'a\\u202eb' is no word"),
    ],
)
def test_a_bad_subject_keeps_its_own_line(row, says, pets):
    Path("bare").mkdir()
    Path("a.csv").write_text(f"folder,class,max_train_steps\npets/rex,dog,\n{row}\n")
    good, bad = read("a.csv")
    assert not good.error and says in bad.error and not bad.settings
    assert [
        subject.name for subject, mark in list_unfinished(Path("out"), [good, bad]) if not mark
    ] == [bad.name]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", "", "give a folder of subject folders"),
        ("none.csv", None, "there is no such file"),
        ("a.csv", "folder\n", "it contains no subject"),
        ("a.csv", "folder\npets/rex\npets/rex\n", "rex is there twice"),
        ("a.csv", "folder,name\npets/rex,Rex\npets/rex,rex\n", "rex is there twice"),
        ("a.csv", "class\ndog\n", "a subject has no folder"),
        ("a.csv", "folder,name\npets/rex,../x\n", "cannot be part of a file's name"),
        ("a.csv", "folder,name\npets/rex,Index.html\n", "the fleet has a file of that name"),
        (
            "a.csv",
            "folder,class,folder\npets/rex,dog,pets/tom\n",
            "the column 'folder' is there twice",
        ),
        ("a.csv", "folder\npets/rex,3\n", "more cells than the first"),
        ("a.jsonl", "[1]\n", "expected names and values, found a list"),
        ("a.toml", "x = 1\n", "[[subjects]]"),
        ("a.csv", "folder\npets/r\0ex\n", "it is not a text file"),
    ],
)
def test_a_list_that_is_wrong_is_one_line(name, text, says, pets):
    if text is not None:
        Path(name).write_text(text)
    with pytest.raises(UserError) as caught:
        read(name)
    assert says in str(caught.value)


def test_what_a_fleet_says_itself_is_refused(pets):
    for setting in ("output_dir", "subjects", "hub_token", "hub_model_id"):
        with pytest.raises(UserError, match=f"--{setting}"):
            read(pets, **{setting: "x"})


def test_only_missing_runs_are_trained_and_changed_ones_again(
    pets,
):
    rex, tom = read(pets)
    (adapter := Path("out") / "rex" / PUBLISHED_NAME).parent.mkdir(parents=True)
    adapter.write_bytes(b"adapter")
    write_record(adapter.parent, Record("done", digest_run(rex.settings)))
    assert [subject.name for subject, _ in list_unfinished(Path("out"), [rex, tom])] == ["tom"]
    adapter.unlink()
    assert len(list_unfinished(Path("out"), [rex, tom])) == 2
    adapter.write_bytes(b"adapter")

    def is_missing(**shared) -> bool:
        return bool(list_unfinished(Path("out"), read(pets, **shared)[:1]))

    assert not is_missing() and is_missing(seed=5)
    Path("moved").mkdir()
    (pets / "rex").rename("moved/rex")
    assert list_unfinished(Path("out"), read("moved")) == []
    Path("moved/rex/1.png").write_bytes(b"another photo")
    assert [s.name for s, _ in list_unfinished(Path("out"), read("moved"))] == ["rex"]


def test_another_caption_or_initial_file_is_another_run(pets):
    caption, begun, marks = pets / "rex" / "1.txt", Path("begun.safetensors"), []
    for prompt, content in (("a red dog", b"one"), ("a tan dog", b"one"), ("a tan dog", b"other")):
        caption.write_text(prompt)
        begun.write_bytes(content)
        marks.append(digest_run(read(pets, init_adapter=str(begun))[0].settings))
    assert len(set(marks)) == 3


@pytest.mark.parametrize("name", ["0.png", "0.mask.png", "1.TXT"])
def test_another_file_of_equal_size_is_another_run(pets, name):
    """Photos and masks counted by their size, and captions by one spelling of their ending."""
    marks = []
    for content in (b"one", b"two", b"one"):
        (pets / "rex" / name).write_bytes(content)
        marks.append(digest_run(read(pets)[0].settings))
    assert marks[0] == marks[2] != marks[1]


def test_another_base_of_the_same_name_is_another_run(pets, tiny_base):
    shutil.copytree(tiny_base, "base")
    marks = []
    for part in ("", "unet", "text_encoder", "vae"):
        for path in Path("base", part).glob("*.safetensors") if part else ():
            flip_last_bit(path)
        settings = read(pets, pretrained_model_name_or_path="base")[0].settings
        marks.append(digest_run(settings))
    assert len(set(marks)) == 4


def test_another_class_image_is_another_run_unless_generated(pets):
    Path("class").mkdir()
    marks = []
    for name, content in (("a", "one"), ("a", "two"), ("class_0123abcd_00000", "drawn")):
        Path("class", f"{name}.png").write_text(content)
        preserved = {"with_prior_preservation": True, "class_data_dir": "class"}
        marks.append(digest_run(read(pets, **preserved)[0].settings))
    assert marks[0] != marks[1] == marks[2]


def test_another_adapter_in_the_run_to_begin_with_is_another_run(pets):
    """Of a run's folder, which `--init_adapter` takes too, its path alone counted."""
    run, marks = RunDir("earlier"), []
    run.path.mkdir()
    for content in (b"one", b"other", b"one"):
        run.adapter_path.write_bytes(content)
        marks.append(digest_run(read(pets, init_adapter=str(run.path))[0].settings))
    assert marks[0] == marks[2] != marks[1]


START = {"type": "start", "time": 1.0, "max_train_steps": 9}
TOY = ["--pretrained_model_name_or_path", "toy"]
STEP = {"type": "step", "time": 2.0, "step": 4, "loss": 0.1}


def scored(dino: float, **more) -> dict:
    return {"type": "evaluation", "time": 3.0, "step": 4, "dino": dino, **more}


def subject(out: Path, name: str, record: Record, *events: dict) -> Path:
    run_dir = out / name
    run_dir.mkdir()
    write_record(run_dir, record)
    (run_dir / "job_config.json").write_text('{"instance_prompt": "a photo of a sks dog"}')
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run_dir


@pytest.fixture
def fleet(tmp_path) -> Path:
    out = tmp_path / "my fleet"
    out.mkdir()
    done = Record("done", "m", seconds=36.0, hours=0.5, unit="GPU")
    subject(out, "fine", done, START, STEP, scored(0.8))
    subject(out, "unlike", done, START, STEP, scored(0.3))
    sheet = (
        subject(out, "copied", done, START, STEP, scored(0.9, copied=0.5, copy_alarm=True))
        / "contact_sheet.png"
    )
    Image.new("RGB", (1000, 700), "red").save(sheet)
    subject(out, "halfway", Record("running", "m", hours=0.25), START, STEP)
    why = (
        rf"no usable photo in {tmp_path}/our pets/bad: "
        r"it is <empty>, nor in C:\Users\me\rex (of a/b and/or 1/2)."
    )
    subject(out, "<b>bad", Record("failed", message=why))
    write_names(out, ["fine", "unlike", "waiting", "copied", "halfway", "<b>bad"])
    return out


def test_the_status_has_counts_costs_and_first_the_failures(fleet, capsys):
    assert [row.name for row in load_rows(fleet)] == [
        "<b>bad",
        "halfway",
        "waiting",
        "copied",
        "unlike",
        "fine",
    ]
    first, cost, *lines = records.format_status(load_rows(fleet))
    assert first == "6 subjects: 1 failed, 1 running, 1 waiting, 3 done"
    assert cost == "cost so far: 1.50 GPU-hours, 0.25 CPU-hours"
    assert any(line == "halfway: running, step 4 of 9" for line in lines)
    assert any(
        line.startswith("copied: done, step 4 of 9: 50% of the pictures repeat a photo")
        for line in lines
    )
    assert not any(line.startswith(("fine", "waiting")) for line in lines)
    assert main(["fleet", "status", str(fleet)]) == 0
    assert first in capsys.readouterr().out and (fleet / "index.html").is_file()
    assert main(["fleet", "status", str(fleet / "fine")]) == 2
    assert "names no subjects" in capsys.readouterr().err


def test_the_page_shows_no_path_and_no_markup_of_others(fleet):
    html = records.write_index(fleet, load_rows(fleet)).read_text(encoding="utf-8")
    assert str(fleet.parent) not in html and "our pets" not in html
    assert "no usable photo in bad: it is &lt;empty&gt;, nor in rex (of a/b and/or 1/2)." in html
    assert "&lt;b&gt;bad" in html and "<b><b>" not in html
    assert html.count("data:image/jpeg") == 1 and 'href="copied/contact_sheet.png"' in html
    assert "0.800" in html and "<script" not in html
    assert (
        html.index("&lt;b&gt;bad")
        < html.index("copied")
        < html.index("unlike")
        < html.index("0.800")
    )


def test_a_damaged_record_is_none(tmp_path):
    for text in ("", "{", "[]", '{"state": 3}', '{"state": "done", "starts": "x"}'):
        (tmp_path / "fleet.json").write_text(text)
        assert read_record(tmp_path) is None, text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pets"], "missing: --out"),
        (["s3://pets", "--out", "x"], "s3://pets: give a folder"),
        (["pets", "more", "--out", "x"], "`more` belongs to no flag"),
        (["pets", "--out", "x"], "missing: --base"),
        (["pets", "--out", "x", "--use_ema"], "not supported here: use_ema"),
        (["pets", "--out", "x", *TOY, "--output_dir", "y"], "--output_dir"),
        (["pets", "--out", "x", "--per_gpu", "0"], "--per_gpu"),
        (["pets", "--out", "x", "--cpus", "0"], "--cpus"),
        (["pets", "--out", "gs://x", *TOY], "gs://x: give a folder"),
    ],
)
def test_a_mistake_is_one_line_and_told_before_a_missing_library(
    arguments, message, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["fleet", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
