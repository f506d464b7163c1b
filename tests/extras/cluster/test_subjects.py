"""Lists of subjects as people write them: a folder of folders, TOML, CSV, JSONL; and who of them is still missing."""

import json
import os
from pathlib import Path

import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME
from dreambooth_moslora.extras.cluster.fleet import missing
from dreambooth_moslora.extras.cluster.records import Record, write_record
from dreambooth_moslora.extras.cluster.subjects import mark_of, read_subjects

SHARED = {"resolution": 64, "max_train_steps": 3}


@pytest.fixture
def pets(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, word in (("rex", "dog"), ("tom", "cat")):
        folder = tmp_path / "pets" / name
        folder.mkdir(parents=True)
        (folder / "subject.json").write_text(json.dumps({"token": "sks", "class_word": word}))
        (folder / "0.png").write_bytes(b"photo")
    return tmp_path / "pets"


def read(source, out="out", **shared):
    return read_subjects(Path(source), {**SHARED, **shared}, Path(out))


def test_a_folder_of_folders_is_a_fleet(pets):
    (pets / ".hidden").mkdir()
    (pets / "notes.txt").write_text("no folder")
    rex, tom = read(pets, instance_prompt="a photo of sks thing")
    assert (rex.name, tom.name) == ("rex", "tom") and not rex.error
    assert (
        rex.settings["instance_prompt"] == "a photo of a sks dog" and tom.settings["class_prompt"] == "a photo of a cat"
    )
    assert rex.settings["output_dir"] == str(Path("out/rex")) and rex.settings["resolution"] == 64


LISTS = {
    "a.csv": "folder,token,class,name,max_train_steps\npets/rex,ohwx,dog,best boy,7\npets/tom,,,,\n",
    "a.jsonl": '{"folder": "pets/rex", "token": "ohwx", "class": "dog", "name": "best boy", "max_train_steps": 7}\n\n'
    '{"folder": "pets/tom"}\n',
    "a.toml": '[[subjects]]\nfolder = "pets/rex"\ntoken = "ohwx"\nclass = "dog"\nname = "best boy"\n'
    "max-train-steps = 7\n"
    '[[subjects]]\nfolder = "pets/tom"\n',
}


@pytest.mark.parametrize("name", LISTS)
def test_every_kind_of_list_says_the_same(name, pets):
    Path(name).write_text(LISTS[name], encoding="utf-8")
    best, tom = read(name)
    assert best.name == "best boy" and int(best.settings["max_train_steps"]) == 7
    assert best.settings["instance_prompt"] == "a photo of a ohwx dog"
    assert tom.settings["instance_prompt"] == "a photo of a sks cat" and tom.settings["max_train_steps"] == 3


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("nowhere,dog,", "no such folder"),
        ("pets/tom,cat,-3", "--max_train_steps -3: must be at least 1"),
        ("bare,,", "does not say what it shows"),
    ],
)
def test_a_bad_subject_keeps_its_own_line(row, says, pets):
    Path("bare").mkdir()
    Path("a.csv").write_text(f"folder,class,max_train_steps\npets/rex,dog,\n{row}\n")
    good, bad = read("a.csv")
    assert not good.error and says in bad.error and not bad.settings
    assert [subject.name for subject, mark in missing(Path("out"), [good, bad]) if not mark] == [bad.name]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", "", "give a folder of subject folders"),
        ("none.csv", None, "there is no such file"),
        ("a.csv", "folder\n", "it contains no subject"),
        ("a.csv", "folder\npets/rex\npets/rex\n", "rex is there twice"),
        ("a.csv", "class\ndog\n", "a subject has no folder"),
        ("a.csv", "folder,name\npets/rex,../x\n", "cannot be part of a file's name"),
        ("a.csv", "folder\npets/rex,3\n", "more cells than the first"),
        ("a.jsonl", "[1]\n", "not a table of names and values"),
        ("a.toml", "x = 1\n", "[[subjects]]"),
        ("a.csv", "folder\npets/r\0ex\n", "it is not a text file"),
        ("a.jsonl", '{"folder": "pets/r\\u0000ex"}\n', "cannot be a folder"),
        ("a.jsonl", '{"folder": "' + "x" * 5000 + '", "name": "a"}\n', "cannot be a folder"),
        ("a.jsonl", '{"folder": "pets/rex", "name": "a\\u0000"}\n', "cannot be part of a file's name"),
    ],
)
def test_a_list_that_is_wrong_is_one_line(name, text, says, pets):
    if text is not None:
        Path(name).write_text(text)
    with pytest.raises(UserError) as caught:
        read(name)
    assert says in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_list_that_is_a_pipe_is_not_waited_for(pets):
    os.mkfifo("a.csv")
    with pytest.raises(UserError, match="not a regular file"):
        read("a.csv")


@pytest.mark.parametrize("setting", ["output_dir", "subjects", "hub_token", "hub_model_id"])
def test_what_a_fleet_says_itself_is_refused(setting, pets):
    with pytest.raises(UserError, match=f"--{setting}"):
        read(pets, **{setting: "x"})


def finish(subject) -> None:
    run_dir = Path("out") / subject.name
    run_dir.mkdir(parents=True)
    (run_dir / PUBLISHED_NAME).write_bytes(b"adapter")
    write_record(run_dir, Record("done", mark_of(subject.settings)))


def test_only_what_is_missing_is_trained(pets):
    rex, tom = read(pets)
    finish(rex)
    assert [subject.name for subject, _ in missing(Path("out"), [rex, tom])] == ["tom"]
    (Path("out") / "rex" / PUBLISHED_NAME).unlink()
    assert len(missing(Path("out"), [rex, tom])) == 2


def test_another_setting_or_photo_is_another_run_and_another_place_is_not(pets):
    rex, _ = read(pets)
    finish(rex)

    def is_missing(**shared) -> bool:
        return bool(missing(Path("out"), read(pets, **shared)[:1]))

    assert not is_missing() and is_missing(seed=5)
    Path("moved").mkdir()
    (pets / "rex").rename("moved/rex")
    assert [s.name for s, _ in missing(Path("out"), read("moved"))] == []
    (Path("moved/rex") / "1.png").write_bytes(b"another photo")
    assert [s.name for s, _ in missing(Path("out"), read("moved"))] == ["rex"]
