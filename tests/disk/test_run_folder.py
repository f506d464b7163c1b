"""Run folder under kills, links and damaged files; and its events."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import ANY

import pytest

from dreambooth_moslora.disk import atomic, events
from dreambooth_moslora.disk.atomic import (
    clean_temporaries,
    make_scratch_directory,
    write_atomic,
    write_atomic_directory,
)
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.disk.events import (
    RunEnded,
    StepDone,
    StepEvaluated,
    build_record,
    filter_events,
    parse_record,
)
from dreambooth_moslora.disk.process_identity import compute_process_token, get_host_id
from dreambooth_moslora.disk.queue import lock_folder
from dreambooth_moslora.disk.run_folder import (
    CHECKPOINT_FILES,
    RunDir,
    find_weights,
    map_adapter_names,
    read_checkpoint_step,
)
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos.sidecars import read_saved_captions
from dreambooth_moslora.plan.validation import check_folders
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training.checkpoint import verify_checkpoint
from dreambooth_moslora.ui.jobs import Job

WRITER = """
import sys
from pathlib import Path
from dreambooth_moslora.disk.atomic import write_atomic_directory, write_atomic
from dreambooth_moslora.disk.run_folder import CHECKPOINT_FILES
root, number = Path(sys.argv[1]), 0
print("ready", flush=True)
while True:
    number += 1
    with write_atomic_directory(root / "checkpoint-5") as folder:
        for name in CHECKPOINT_FILES:
            (folder / name).write_text(str(number) * 20000)
    write_atomic(root / "one.txt", str(number) * 20000)
"""
BEST = {"step": 2, "score": 0.5, "since": 0}


def test_a_run_without_an_adapter_is_told_how_it_goes_on(tmp_path):
    """Name the command that explains how to continue."""
    with pytest.raises(UserError, match="there is no adapter file"):
        find_weights(tmp_path)
    RunDir(tmp_path).metrics_path.write_text("")
    with pytest.raises(UserError, match=r"has no adapter: .*`explain .*` says how to go on"):
        find_weights(tmp_path)


def make_checkpoint(folder: Path, text: str = "x") -> None:
    folder.mkdir()
    for name in CHECKPOINT_FILES:
        (folder / name).write_text(text)


@pytest.mark.parametrize("round_", range(6))
def test_a_kill_leaves_whole_files_and_one_checkpoint(tmp_path, round_):
    process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE)
    process.stdout.readline()
    while not (tmp_path / "one.txt").exists():
        time.sleep(0.005)
    time.sleep(0.013 * round_)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (checkpoint,) = RunDir(tmp_path).list_checkpoints()
    texts = [(checkpoint / name).read_text() for name in CHECKPOINT_FILES]
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) % 20000 == 0 and texts[0]
    whole = (tmp_path / "one.txt").read_text()
    assert whole == whole[: len(whole) // 20000] * 20000
    clean_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "one.txt"]


@pytest.mark.parametrize("has_same_pid", [False, True])
def test_a_kill_between_two_renames_loses_nothing(has_same_pid, tmp_path):
    """Restore the folder of an ended process, also of one that had this process's number."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for kind, text in (("old", "before"), ("new", "half")):
        make_checkpoint(
            tmp_path
            / f".checkpoint-7.{os.getpid() if has_same_pid else ended.pid}-0123abcd.{kind}",
            text,
        )
    (checkpoint,) = RunDir(tmp_path).list_checkpoints()
    assert (checkpoint / "optimizer.pt").read_text() == "before"
    with write_atomic_directory(tmp_path / "checkpoint-7") as folder:
        (folder / "a").write_text("after")
        clean_temporaries(tmp_path)
    assert (tmp_path / "checkpoint-7" / "a").read_text() == "after"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def test_temporaries_in_use_and_hidden_files_are_kept(tmp_path):
    names = {
        f".checkpoint-7.{(pid := os.getppid())}-{compute_process_token(pid)}.new",
        f".a.{'9' * 40}-0123abcd.new",
    }
    names |= {".diary.2024.new", ".book.1999-ab.old", ".my notes.4194300.old"}
    for name in names:
        (tmp_path / name).mkdir()
    clean_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.skipif(os.name == "nt", reason="Windows locks no folders, and has no containers")
def test_temporaries_of_another_container_are_kept(tmp_path):
    """Keep the folder of a process that is not visible here, which the lock alone shows."""
    hidden = tmp_path / f".checkpoint-7.999999999-0123abcd-{get_host_id()}.new"
    with make_scratch_directory(tmp_path, "checkpoint-7") as scratch:
        scratch.rename(hidden)
        clean_temporaries(tmp_path)
        assert hidden.is_dir()
    clean_temporaries(tmp_path)
    assert not hidden.exists()


def test_temporaries_of_another_host_are_kept_for_a_day(tmp_path, monkeypatch):
    """Keep what a process of another host writes: its number says nothing here."""
    for kind in ("old", "new"):
        make_checkpoint(tmp_path / f".checkpoint-7.1-0123abcd-89abcdef.{kind}")
    clean_temporaries(tmp_path)
    assert len(os.listdir(tmp_path)) == 2 and not RunDir(tmp_path).list_checkpoints()
    monkeypatch.setattr(atomic, "MAX_FOREIGN_AGE_SEC", 0)
    clean_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-7"]
    with make_scratch_directory(tmp_path) as scratch:
        assert scratch.name.endswith(f"-{get_host_id()}.new")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(
    number, tmp_path, monkeypatch, caplog
):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_folder(tmp_path), lock_folder(tmp_path):
        pass
    [message] = caplog.messages
    assert message.startswith(f"{tmp_path}: files there cannot be locked ({os.strerror(number)})")
    assert message.endswith("two runs in it are not kept apart") and not os.listdir(tmp_path)


@pytest.mark.parametrize("kind", ["link", "link to nothing", "folder", "pipe"])
@pytest.mark.parametrize(
    "name",
    [
        "run.lock",
        "metrics.jsonl",
        "train.log",
        "job.log",
        "job_config.json",
        ".worker.lock",
        ".job.json.tmp",
    ],
)
def test_links_and_pipes_in_a_run_folder_are_refused(name, kind, tmp_path):
    """Follow no link: the lock would empty the file that it leads to."""
    (run := tmp_path / "run").mkdir()
    (target := tmp_path / "mine.txt").write_text("precious")
    if kind.startswith("link"):
        (run / name).symlink_to(target if kind == "link" else tmp_path / "nothing")
    else:
        (run / name).mkdir() if kind == "folder" else os.mkfifo(run / name)
    for begin in (
        lock_folder(run).__enter__,
        partial(check_folders, TrainConfig(output_dir=str(run))),
    ):
        with pytest.raises(UserError, match=f"run: {name} in it is no file of its own"):
            begin()
    assert target.read_text() == "precious" and sorted(os.listdir(tmp_path)) == ["mine.txt", "run"]


REFUSED = {
    "metrics.jsonl": lambda path: RunDir(path.parent).read_events(),
    "README.md": lambda path: RunDir(path.parent).read_card(),
    "train_config.json": read_json,
    "adapter_config.json": read_json,
    "position.json": lambda path: verify_checkpoint(path.parent),
}
TREATED_AS_DAMAGED = {
    "last/position.json": lambda path: read_checkpoint_step(path.parent) == -1,
    "captions.json": lambda path: read_saved_captions(path) == {},
    "job.json": lambda path: Job.load(path.parent) is None,
}


@pytest.mark.parametrize("name", [*REFUSED, *TREATED_AS_DAMAGED])
def test_a_file_of_gigabytes_is_not_read(name, tmp_path):
    """Refuse a sparse file without reading it whole."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.truncate(path, 2**36)
    if name in TREATED_AS_DAMAGED:
        assert TREATED_AS_DAMAGED[name](path)
        return
    with pytest.raises(UserError, match=rf"{name}: .*it has more than \d\d MiB"):
        REFUSED[name](path)


def test_an_error_keeps_the_old_content(tmp_path):
    with write_atomic_directory(tmp_path / "x") as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), write_atomic_directory(tmp_path / "x") as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    assert (tmp_path / "x" / "a").read_text() == "1" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "x" / "a", None)
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["a"]
    (orphan := tmp_path / "x" / f".scratch.{os.getpid()}-0123abcd.new").mkdir()
    with pytest.raises(RuntimeError), make_scratch_directory(tmp_path / "x") as scratch:
        assert not orphan.exists() and scratch.is_dir()
        raise RuntimeError
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["a"]


def test_checkpoints_are_ordered_by_step_and_rotated(tmp_path):
    run = RunDir(tmp_path)
    assert run.find_latest_checkpoint() is None
    for step in (1000, 200, 30):
        make_checkpoint(run.get_checkpoint_path(step))
    run.get_checkpoint_path(3000).mkdir()
    make_checkpoint(run.get_checkpoint_path(2000))
    (run.get_checkpoint_path(2000) / "optimizer.pt").write_bytes(b"")
    (tmp_path / "checkpoint-9000").write_text("a file")
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in run.list_checkpoints()] == [
        "checkpoint-30",
        "checkpoint-200",
        "checkpoint-1000",
    ]
    run.rotate_checkpoints(None)
    run.rotate_checkpoints(2)
    assert [path.name for path in run.list_checkpoints()] == ["checkpoint-200", "checkpoint-1000"]
    assert run.find_latest_checkpoint().name == "checkpoint-1000"
    make_checkpoint(run.last_dir)
    # infinity, for which Python has no int
    (run.last_dir / "position.json").write_text('{"step": 1e999}')
    assert run.find_latest_checkpoint().name == "checkpoint-1000"


def test_incomplete_and_foreign_lines_of_metrics_are_skipped(tmp_path):
    """Accept every kind of line break in an event."""
    run = RunDir(tmp_path / "new")
    assert run.read_events() == []
    run.record_event(
        {
            "type": "step",
            "loss": float("nan"),
            "inner": {"x": [float("inf"), 1.5]},
            "path": Path("a"),
        }
    )
    with run.metrics_path.open("a") as file:
        file.write('{"type": "st')
    run.record_event({"type": "end"})
    first, last = run.read_events()
    assert first == {"type": "step", "loss": None, "inner": {"x": [None, 1.5]}, "path": "a"}
    assert last == {"type": "end"}
    json.loads(run.metrics_path.read_text().splitlines()[0], parse_constant=pytest.fail)
    event = {"type": "start", "instance_prompt": "a\u2028b\x85c\nd\re"}
    run.metrics_path.write_text(
        '{"step": 1}\n{"type": 3}\n{"type": "step", "step": "two"}\n[1]\n{"type": "end"}\n'
    )
    run.record_event(event)
    assert run.read_events() == [{"type": "end"}, event]
    run.record_event({"type": "step", "said": "end"})
    assert run.read_events("end") == [{"type": "end"}]


EVENTS = [
    events.RunStarted(9, {"rank": 4}),
    events.PhaseProgress("caching", 2, 3),
    StepDone(3, loss=0.5, loss_instance=0.5, lr=1e-4),
    events.SamplesSaved(3, ["samples/a.png"], ["a dog"], [7]),
    StepEvaluated(
        3,
        {"dino": 0.5, "score": 0.25},
        {"step": 3, "score": 0.25, "since": 0},
        copy_alarm=True,
        cost={"seconds": 1.0},
    ),
    events.CheckpointSaved(3, "checkpoint-3"),
    events.AdapterExported(["a.safetensors"], {"checked": 1}),
    RunEnded("done", 3),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_an_event_is_restored_from_its_line(event):
    record = build_record(event)
    assert parse_record(record) == event and record["type"] == event.kind and "scores" not in record
    assert record.get("dino") == (0.5 if isinstance(event, StepEvaluated) else None)


WRONG_RECORDS = [
    {"type": "step", "step": 2, "loss": "0.5"},
    {"type": "step", "step": 2, "lr": [1]},
    {"type": "step", "step": 2, "time": "yesterday"},
    {"type": "evaluation", "step": 2, "best": 3},
    {"type": "evaluation", "step": 2, "best": {"stdp": 2, "score": 0.5, "since": 0}},
    {"type": "evaluation", "step": 2, "best": BEST | {"score": None}},
    {"type": "sample", "step": 2, "files": "a.png", "prompts": [], "seeds": []},
    {"type": "step", "step": True},
    {"type": "step"},
    {"type": ["step"]},
    {"type": "epoch", "step": 1},  # of another program
]


def test_a_line_of_wrong_types_is_no_event():
    assert not any(map(parse_record, WRONG_RECORDS))
    assert parse_record({"type": "step", "step": 2, "loss": 1, "lr": None}) == StepDone(
        2, loss=1, lr=None, time=ANY
    )
    assert parse_record({"type": "evaluation", "step": 2, "best": BEST}).best == BEST
    assert parse_record({"type": "evaluation", "step": 2, "score": 1}).scores == {"score": 1}
    lines = [{"type": "step"}, {"type": "step", "step": 2, "new": 1}]
    assert [event.step for event in filter_events(StepDone, lines)] == [2]


def test_adapters_of_one_name_are_numbered(tmp_path):
    (tmp_path / "sub").mkdir()
    files = [tmp_path / f"{name}.safetensors" for name in ("0", "1", "sub/1")]
    for file in files:
        file.write_bytes(b"")
    names = map_adapter_names(files, [tmp_path], ["0"])
    assert names == dict(zip(("0 2", "1", "1 2"), files, strict=True))
