"""Run folders behind a URL: whole or not taken, tried again, and nothing lost when the bucket is
away."""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.cluster import bucket as bucket_module
from dreambooth_moslora.extras.cluster import remote_output
from dreambooth_moslora.extras.cluster.bucket import (
    TRIES,
    Bucket,
    Mirror,
    SupersededError,
    read_manifest,
)
from dreambooth_moslora.extras.cluster.records import (
    Record,
    is_finished,
    read_record,
    write_names,
    write_record,
)
from dreambooth_moslora.extras.cluster.remote_output import RemoteFleet, train_in_bucket
from dreambooth_moslora.extras.cluster.worker import Job
from tests.extras.cluster.test_fleet_subjects import START, STEP, subject

FLEET = "flaky://bucket/fleet"
TWO = ["checkpoint-1", "checkpoint-2"]
HOW = "write it like s3://BUCKET/PATH."


def well(path: str) -> None:
    """No fault."""


def away(path: str) -> None:
    raise ConnectionError("no route to host")


class FlakyBucket(MemoryFileSystem):
    """An object store in this process's memory, `flaky://NAME`. Before each request it asks `fault`
    about the file's path; what that raises is the failure."""

    protocol = "flaky"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    fault: ClassVar[Callable[[str], None]] = well
    sent: ClassVar[list[str]] = []

    @classmethod
    def forget(cls) -> None:
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.sent.clear()
        cls.fault = well

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def put_file(self, lpath, rpath, **options):
        type(self).fault(rpath)
        super().put_file(lpath, rpath, **options)
        self.sent.append(rpath)


def after_fault(name: str):
    """The request of that name to the store in memory, which the fault may forbid. Its path is its
    first argument."""
    plain = getattr(MemoryFileSystem, name)
    return lambda store, path, *rest, **options: (
        type(store).fault(path) or plain(store, path, *rest, **options)
    )


for request in ("get_file", "rm_file", "exists", "cat_file"):
    setattr(FlakyBucket, request, after_fault(request))
fsspec.register_implementation("flaky", FlakyBucket, clobber=True)


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    FlakyBucket.forget()
    monkeypatch.setattr(bucket_module, "FIRST_WAIT_SEC", 0.001)
    monkeypatch.setattr(remote_output, "POLL_SEC", 0.02)
    monkeypatch.setattr(remote_output, "LOOK_SEC", 0.05)
    machine(tmp_path / "one", monkeypatch)
    return FlakyBucket


def machine(folder: Path, monkeypatch) -> None:
    """From now on this process has the scratch folders of another machine."""
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


def mirror_in(folder: Path) -> Mirror:
    folder.mkdir(parents=True, exist_ok=True)
    return Mirror(Bucket(f"{FLEET}/rex"), folder)


def checkpoint(run: Path, step: int) -> Path:
    path = RunDir(run).checkpoint_path(step)
    path.mkdir(parents=True)
    for name in ("position.json", "optimizer.pt", "moslora_weights.safetensors"):
        (path / name).write_text(f"{name} {step} bytes")
    return path


def pulled(folder: Path) -> Mirror:
    mirror = mirror_in(folder)
    mirror.pull()
    return mirror


def refuse_the_adapter(path: str) -> None:
    if path.endswith("pytorch_lora_weights.safetensors"):
        away(path)


def steps_in(run: Path) -> list[str]:
    return [path.name for path in RunDir(run).checkpoints()]


def pushed(folder: Path, *steps: int) -> Mirror:
    mirror = mirror_in(folder)
    mirror.claim()
    for step in steps:
        checkpoint(folder, step)
    (folder / "metrics.jsonl").write_text("1\n")
    mirror.push()
    return mirror


def test_a_folder_comes_back_as_it_was_without_locks_and_only_what_has_changed_is_sent(
    tmp_path, store
):
    mirror = pushed(tmp_path / "a", 1, 2)
    for name in ("run.lock", "run.owner", ".worker.lock", ".checkpoint-3.17-ab.new"):
        (mirror.folder / name).write_text("x")
    mirror.push()
    other = pulled(tmp_path / "b")
    names = sorted(
        str(path.relative_to(other.folder)) for path in other.folder.rglob("*") if path.is_file()
    )
    assert len(names) == 7 and names[-1] == "metrics.jsonl" and steps_in(other.folder) == TWO
    assert all(
        (other.folder / name).read_bytes() == (mirror.folder / name).read_bytes() for name in names
    )
    RunDir(mirror.folder).rotate(1)
    store.sent.clear()
    mirror.push()
    assert [path.rpartition("/")[2] for path in store.sent] == ["manifest.json"]
    assert [any(name in path for path in store.store) for name in TWO] == [False, True]


def test_half_of_an_upload_is_not_taken_and_the_next_push_completes_it(tmp_path, store):
    mirror = pushed(tmp_path / "a", 1)

    store.fault = lambda path: path.endswith("checkpoint-2/optimizer.pt") and away(path)
    checkpoint(mirror.folder, 2)
    (mirror.folder / "metrics.jsonl").write_text("1\n2\n")
    with pytest.raises(UserError, match=rf"optimizer.pt: no route to host, {TRIES} times"):
        mirror.push()
    assert any("checkpoint-2/position.json" in path for path in store.store)
    other = pulled(tmp_path / "b")
    assert (
        steps_in(other.folder) == ["checkpoint-1"]
        and (other.folder / "metrics.jsonl").read_text() == "1\n2\n"
    )
    store.fault = well
    mirror.push()
    assert steps_in(pulled(tmp_path / "c").folder) == TWO


def test_a_checkpoint_with_a_flipped_byte_is_left_out_whole_and_mended(tmp_path, store):
    pushed(tmp_path / "a", 1, 2)
    Bucket(f"{FLEET}/rex").write("checkpoint-2/optimizer.pt", b"optimizer.pt 2 bytez")
    other = pulled(tmp_path / "b")
    assert (
        steps_in(other.folder) == ["checkpoint-1"] and not (other.folder / "checkpoint-2").exists()
    )
    other.claim()
    checkpoint(other.folder, 2)
    other.push()
    assert steps_in(pulled(tmp_path / "c").folder) == TWO


def test_what_fails_for_a_moment_is_tried_again_and_what_fails_for_ever_is_not(tmp_path, store):
    tries: list[str] = []

    def fail_twice(path: str) -> None:
        tries.append(path)
        if tries.count(path) < 3:
            raise TimeoutError("slow down")

    def fail(path: str) -> None:
        tries.append(path)
        # as botocore's own
        raise type("NoCredentialsError", (Exception,), {})("Unable to locate credentials")

    store.fault = fail_twice
    mirror = pushed(tmp_path / "a", 1)
    assert "checkpoint-1/optimizer.pt" in read_manifest(mirror.bucket).files
    tries, store.fault = [], fail
    with pytest.raises(UserError, match=r"fleet/a: Unable to locate credentials\.$"):
        Bucket(FLEET).read("a")
    assert len(tries) == 1


def test_one_who_was_taken_for_lost_writes_no_more(tmp_path, store):
    lost = pushed(tmp_path / "a", 1)
    other = pulled(tmp_path / "b")
    other.claim()
    checkpoint(lost.folder, 2)
    before = dict(store.store)
    with pytest.raises(SupersededError):
        lost.push()
    assert store.store == before


NO_FILES = [
    {"../../evil": "0"},
    {"/evil": "0"},
    {"a": 1},
    {"a\0b": "0"},
    {"n" * 300: "0"},
    {"a\ud800b": "0"},
]
NO_FILES += [{"a": "0", "a/b": "0"}, {"a/": "0", "a/b": "0"}, {"/".join(["n" * 200] * 30): "0"}]


def test_a_manifest_of_somebody_else_names_no_file_outside_and_none_that_cannot_be():
    bucket = Bucket(f"{FLEET}/rex")
    for text in ("{", "[]", '{"writer": 3}', *(json.dumps({"files": files}) for files in NO_FILES)):
        bucket.write("manifest.json", text.encode())
        assert not read_manifest(bucket).files, text


def training(steps: range, goes_on: bool = False):
    """What a worker does in its folder: a checkpoint a step, then the adapter; or it waits to be
    stopped."""

    def train(job: Job) -> Record:
        run = Path(job.run_dir)
        assert job.settings["output_dir"] == str(run)
        for step in steps:
            checkpoint(run, step)
            while f"checkpoint-{step}/position.json" not in read_manifest(Bucket(job.url)).files:
                time.sleep(0.01)
        while goes_on and not (run.parent / "fleet.stop").exists():
            time.sleep(0.01)
        if not goes_on:
            (run / "pytorch_lora_weights.safetensors").write_text("adapter")
        write_record(run, record := Record("interrupted" if goes_on else "done", job.mark))
        return record

    return train


def find(job: Job) -> Record:
    """A worker that has nothing left to train."""
    assert is_finished(Path(job.run_dir), "mark")
    return read_record(Path(job.run_dir))


JOB = Job("/anywhere/rex", {}, "mark", url=f"{FLEET}/rex")


def test_a_run_that_is_stopped_goes_on_elsewhere_and_leaves_nothing_on_the_machine(
    tmp_path, monkeypatch
):
    Bucket(FLEET).write("fleet.stop", b"\n")
    assert train_in_bucket(JOB, training(range(1, 3), goes_on=True)).state == "interrupted"
    Bucket(FLEET).remove("fleet.stop")
    assert not list(tmp_path.glob("one/*/*"))
    machine(tmp_path / "two", monkeypatch)
    seen = []

    def go_on(job: Job) -> Record:
        seen.extend(steps_in(Path(job.run_dir)))
        assert read_record(Path(job.run_dir)).state == "interrupted"
        return training(range(3, 4))(job)

    assert train_in_bucket(JOB, go_on).state == "done" and seen == TWO
    (tmp_path / "view").mkdir()
    RemoteFleet(Bucket(FLEET), tmp_path / "view").fetch("rex")
    assert is_finished(tmp_path / "view" / "rex", "mark") and not is_finished(
        tmp_path / "view" / "rex", "other"
    )


def test_what_the_bucket_did_not_take_at_the_end_is_kept_while_it_is_away_and_sent_by_the_next_try(
    store,
):
    store.fault = refuse_the_adapter
    record = train_in_bucket(JOB, training(range(1, 2)))
    assert (
        record.state == "failed"
        and "no route to host" in record.message
        and "are in" in record.message
    )
    store.fault = away
    assert "manifest.json: no route to host" in train_in_bucket(JOB, find).message
    store.fault = well
    assert train_in_bucket(JOB, find).state == "done"
    assert "pytorch_lora_weights.safetensors" in read_manifest(Bucket(JOB.url)).files


def test_what_a_killed_worker_could_not_send_is_found_by_the_next_try(tmp_path, store):
    """The bucket is away when the worker is killed: its newest checkpoint is on this machine
    alone."""

    def be_killed(job: Job) -> Record:
        training(range(1, 2), goes_on=False)(job)
        store.fault = away
        checkpoint(Path(job.run_dir), 2)
        write_record(Path(job.run_dir), Record("running", job.mark, starts=1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_in_bucket(JOB, be_killed)
    store.fault = well
    seen = []
    go_on = lambda job: seen.extend(steps_in(Path(job.run_dir))) or training(range(3, 4))(job)  # noqa: E731
    assert train_in_bucket(JOB, go_on).state == "done" and seen == TWO


def test_what_another_machine_did_since_then_is_not_undone_by_an_unsent_end(
    tmp_path, monkeypatch, store
):
    store.fault = refuse_the_adapter
    assert train_in_bucket(JOB, training(range(1, 2))).state == "failed"
    store.fault = well
    machine(tmp_path / "two", monkeypatch)
    assert train_in_bucket(JOB, training(range(2, 4))).state == "done"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "one"))
    seen = []
    assert (
        train_in_bucket(
            JOB, lambda job: seen.extend(steps_in(Path(job.run_dir))) or find(job)
        ).state
        == "done"
    )
    assert seen == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_checkpoint_that_is_removed_while_it_is_sent_is_passed_over(tmp_path, store):
    mirror = mirror_in(tmp_path / "a")
    mirror.claim()
    gone, _ = (checkpoint(mirror.folder, step) for step in (1, 2))
    store.fault = lambda path: "checkpoint-1" in path and shutil.rmtree(gone, ignore_errors=True)
    mirror.push()
    assert {name.split("/")[0] for name in read_manifest(mirror.bucket).files} == {"checkpoint-2"}


def test_status_reads_a_bucket_or_a_folder_by_its_url_and_leaves_the_index_there(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    run = subject(out, "rex", Record("failed", "m", message="no usable photo"), START, STEP)
    mirror = mirror_in(run)
    mirror.claim()
    mirror.push()
    write_names(out, ["rex", "tom"])
    Bucket(FLEET).write("fleet.json", (out / "fleet.json").read_bytes())
    assert main(["fleet", "status", FLEET]) == 0
    shown = capsys.readouterr().out
    assert (
        "2 subjects: 1 failed, 1 waiting" in shown
        and "rex: failed, step 4 of 9: no usable photo" in shown
    )
    assert shown.endswith(f"{FLEET}/index.html\n") and b"no usable photo" in Bucket(FLEET).read(
        "index.html"
    )
    assert main(["fleet", "status", f"file://{out}"]) == 0 and (out / "index.html").is_file()


@pytest.fixture
def fleet_view(tmp_path):
    """The driver's side of a fleet with one subject, whose list is in the bucket."""
    view = tmp_path / "view"
    view.mkdir()
    write_names(view, ["rex"])
    remote = RemoteFleet(Bucket(FLEET), view)
    with remote.begun():
        return remote


def test_the_ending_of_a_fleet_is_told_with_the_bucket_away(fleet_view, store):
    with pytest.raises(UserError, match=r"^its own ending\.$"), fleet_view.begun():
        store.fault = away
        raise UserError("its own ending.")


def test_a_run_that_is_stopped_with_the_bucket_away_is_interrupted_and_keeps_its_record(store):
    def be_stopped(job: Job) -> Record:
        store.fault = away
        write_record(
            Path(job.run_dir), record := Record("interrupted", job.mark, hours=0.5, starts=1)
        )
        return record

    record = train_in_bucket(JOB, be_stopped)
    assert (record.state, record.hours, record.starts) == ("interrupted", 0.5, 1)
    assert "no route to host" in record.message and "the same command sends them" in record.message


def test_a_failure_that_knows_of_no_training_does_not_replace_one_that_does(fleet_view):
    """With `starts` at 0 the next try would begin anew beside its checkpoints."""
    running = Record("running", "mark", starts=2)
    for content, kept in ((running, running), (None, Record("failed"))):
        fleet_view.bucket.remove("rex/fleet.json")
        if content is not None:
            fleet_view.bucket.write("rex/fleet.json", json.dumps(vars(content)).encode())
        (fleet_view.view / "rex").mkdir(exist_ok=True)
        write_record(fleet_view.view / "rex", Record("failed"))
        fleet_view.note_failure("rex", Record("failed"))
        assert json.loads(fleet_view.bucket.read("rex/fleet.json")) == vars(kept)


def denied(path: str) -> None:
    raise PermissionError("Access Denied")


@pytest.mark.parametrize(
    ("place", "fault", "says"),
    [
        (FLEET, denied, "access denied (Access Denied); look at the credentials"),
        (FLEET, well, "flaky://bucket/fleet holds no fleet"),
        ("gs://bucket/fleet", well, "pip install gcsfs"),
        ("nothing://bucket", well, "Protocol not known: nothing"),
    ],
)
def test_a_mistake_is_one_line(place, fault, says, store, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    store.fault = fault
    assert main(["fleet", "status", place]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("url", ["://x", "s3:///", "memory://fleet"])
def test_a_url_without_a_bucket_that_others_see_is_refused(url, tmp_path, capsys):
    (tmp_path / "photos" / "rex").mkdir(parents=True)
    command = [
        "fleet",
        str(tmp_path / "photos"),
        "--out",
        url,
        "--pretrained_model_name_or_path",
        "toy",
    ]
    assert main([*command, "--instance_prompt", "a dog", "--dry_run"]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {url}: names no bucket that several machines see; {HOW}\n"
    )
