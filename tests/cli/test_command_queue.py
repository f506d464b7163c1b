"""`train … --queue` and `queue`: what is added, listed, moved, removed, trained and refused."""

import json
import os
from pathlib import Path

import pytest

from dreambooth_moslora.cli import command_queue
from dreambooth_moslora.cli.command_train import train_main
from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.queue import RunQueue
from dreambooth_moslora.plan import memory
from dreambooth_moslora.ui import jobs as page_jobs
from tests.helpers.tiny_training import paint_photos

TOY = [
    "--pretrained_model_name_or_path",
    "toy",
    "--instance_prompt",
    "a photo of sks hen",
    "--resolution",
    "64",
]


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return paint_photos(tmp_path / "hen")


def add(*words: str) -> int:
    return train_main([*TOY, "--instance_data_dir", "hen", "--queue", *words])


def test_a_run_is_added_with_its_whole_config_and_words_and_nothing_is_trained(photos, capsys):
    assert add("--output_dir", "runs/hen", "--max_train_steps", "7") == 0
    assert (
        capsys.readouterr().out
        == "hen waits, number 1 in the queue; `queue start` or the page trains it\n"
    )
    (run,) = RunQueue(Path.cwd() / "runs").waiting()
    assert (run.settings["max_train_steps"], run.settings["rank"]) == (7, 4)
    assert (run.folder, run.argv[:2]) == (str(photos.parent), tuple(TOY[:2])) and run.argv[
        -1
    ] == "7"
    assert not os.listdir("runs/hen")


def test_one_word_finds_another_name_for_the_second_run(photos, capsys, monkeypatch):
    monkeypatch.setattr(memory, "least_free_gib", lambda **later: None)
    words = ["train", "hen", "hen", "--pretrained_model_name_or_path", "toy", "--queue"]
    assert main(words) == main(words) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("hen_2 waits, number 2")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rank", "0"], "--rank 0"),
        (["--target_modules", "to_x"], "the UNet has no such layer"),
        (["--hub_token", "x", "--push_to_hub"], "--hub_token: it would lie in the queue's file"),
        (["--output_dir", "runs/.hen"], "'.hen' cannot be the name of a run"),
        (["--resume_from_checkpoint", "checkpoint-7"], "no complete checkpoint there"),
        (
            ["--instance_prompt", "a photo of sks", "--masks", "auto", "--mask_model", "x"],
            "give --mask_prompt",
        ),
        (
            ["--instance_prompt", "sks", "--captions", "auto", "--caption_model", "x"],
            "captions: no word says",
        ),
        (
            [TOY[0], "Tongyi-MAI/Z-Image", "--mixed_precision", "fp16"],
            "Z-Image overflows in fp16; give bf16",
        ),
    ],
)
def test_what_training_would_refuse_is_not_added(photos, capsys, words, says):
    assert add("--output_dir", "runs/hen", *words) == 2
    assert says in capsys.readouterr().err and not RunQueue(Path.cwd() / "runs").waiting()


def test_the_queue_is_listed_moved_and_emptied(photos, capsys):
    for name in ("hen", "cat"):
        add("--output_dir", f"runs/{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert add("--output_dir", "runs/two") == 2
    assert add("--output_dir", "runs/hen") == 2
    assert "hen is in the queue already" in capsys.readouterr().err
    # opened, it would be waited for until somebody writes to it
    os.mkfifo("runs/.queue/waiting/pipe.json")
    assert main(["queue", "move", "cat", "first"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("  1  cat  ") and "--instance_data_dir hen" in second
    for words, says in (
        (["queue", "move", "cow", "up"], "no run called 'cow'"),
        (["queue", "go"], "say list, start"),
    ):
        assert main(words) == 2 and says in capsys.readouterr().err
    assert main(["queue", "remove", "cat"]) == main(["queue", "remove", "hen"]) == 0
    capsys.readouterr()
    assert main(["queue"]) == 0 and capsys.readouterr().out.startswith("nothing waits")
    assert not Path("runs/hen").exists()


def test_an_empty_queue_is_said_and_a_mistyped_folder_is_not_made(tmp_path, capsys):
    typo = ["--runs_dir", str(tmp_path / "typo")]
    for words in (["move", "hen", "first"], ["remove", "hen"]):
        assert main(["queue", *words, *typo]) == 2
        assert (
            capsys.readouterr().err
            == f"error: --runs_dir {tmp_path / 'typo'}: there is no such folder.\n"
        )
    assert main(["queue", "start", *typo]) == 0
    assert capsys.readouterr().err.startswith("nothing waits") and not os.listdir(tmp_path)


def test_the_folder_of_runs_may_be_in_the_home_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    (tmp_path / "runs").mkdir()
    assert main(["queue", "remove", "hen", "--runs_dir", "~/runs"]) == 2
    assert "no run called 'hen' waits" in capsys.readouterr().err and not Path("~").exists()


def test_start_trains_all_that_wait_says_how_each_ended_and_answers_with_one(
    photos, capsys, monkeypatch
):
    monkeypatch.setattr(command_queue, "POLL_SEC", 0.02)
    (stand_in := photos.parent / "trainer.py").write_text(
        "import json, sys, time\nconfig = json.load(open(sys.argv[2]))\n"
        "if config['rank'] == 3: sys.exit('error: no memory for rank 3')\n"
        "event = {'type': 'start', 'time': time.time(), 'max_train_steps': 5, 'config': {}}\n"
        "end = {'type': 'end', 'time': time.time(), 'state': 'done', 'step': 5}\n"
        "open(config['output_dir'] + '/metrics.jsonl', 'w')"
        ".write(json.dumps(event) + '\\n' + json.dumps(end) + '\\n')"
    )
    monkeypatch.setattr(page_jobs.processes, "TRAIN", (str(stand_in),))
    for name, rank in (("hen", "3"), ("cat", "4")):
        add("--output_dir", f"runs/{name}", "--rank", rank)
    RunQueue(Path("runs")).pause()
    assert main(["queue"]) == 0 and capsys.readouterr().out.endswith("or `queue start`\n")
    assert main(["queue", "start"]) == 1
    told = capsys.readouterr().err
    assert told.index("hen failed: error: no memory for rank 3\n") < told.index("cat done\n")
    assert (
        main(["queue"]) == 0
        and "ended: cat done" in (out := capsys.readouterr().out)
        and "paused" not in out
    )
    assert json.loads(Path("runs/cat/job.json").read_text())["folder"] == str(photos.parent)
