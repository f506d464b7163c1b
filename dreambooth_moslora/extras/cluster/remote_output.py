"""A fleet whose `--out` is a URL.

Each worker trains in a local folder, which is mirrored in the bucket. The rest of the fleet's code
works on folders, so the driver keeps a local copy of the few files it needs (`VIEWED`).
"""

import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dreambooth_moslora.disk import processes, run_folder
from dreambooth_moslora.disk.atomic import atomic_write
from dreambooth_moslora.disk.contents import content_key
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.cluster import fleet_subjects, ray_fleet, records, worker
from dreambooth_moslora.extras.cluster.bucket import (
    Bucket,
    Mirror,
    SupersededError,
    at_once,
    read_manifest,
)
from dreambooth_moslora.extras.cluster.fleet import Ending, Machines, checked, run_fleet

VIEWED = (records.FLEET_NAME, processes.CONFIG_NAME, "metrics.jsonl", "contact_sheet.png")
"""The files of a run folder that the driver reads."""
POLL_SEC = 0.5
"""Seconds between two looks for a new checkpoint."""
LOOK_SEC = 5.0
"""Seconds between two looks for a stop of the fleet, and after an error."""
LEAST_OFTEN_SEC = 60.0
"""Seconds between two pushes, at most, while there is no new checkpoint."""
NOT_THERE = "the files of {name} are not in the bucket any more"
"""Why a subject that a worker calls done has failed."""
UNSENT = ".unsent"
"""Marks a folder that may have files which the bucket lacks, by the writer in its manifest, or
those that may be."""


def train_in_bucket(
    job: worker.Job, train: Callable[[worker.Job], records.Record] = worker.train_subject
) -> records.Record:
    """Train the subject of `job.url` in a local folder; its files are in the bucket at the end. A
    run whose last files the bucket does not take has failed, unless it was interrupted; it keeps
    its record."""
    record = records.Record("failed", job.mark)
    try:
        with mirrored(job) as here:
            record = train(here)
    except UserError as error:
        state = record.state if record.state == "interrupted" else "failed"
        message = f"{record.message} {error}" if record.state == "failed" else str(error)
        return replace(record, state=state, message=message.strip())
    return record


@contextmanager
def mirrored(job: worker.Job) -> Iterator[worker.Job]:
    """The same job in a local folder, which starts as a copy of the bucket and is copied back.
    Raises UserError when the bucket cannot be read or does not take the last files; the folder then
    stays for a retry."""
    # a local folder that equals the bucket, or goes on where a lost worker ended
    home = scratch_home(job.url)
    folder = home / Path(job.run_dir).name
    folder.mkdir(parents=True, exist_ok=True)
    (home / records.STOP_NAME).unlink(missing_ok=True)
    mirror = Mirror(Bucket(job.url), folder)
    with worker.held(folder):  # wait until the training of a lost worker has ended
        begin(mirror, job.mark)

    # train, while a thread sends each checkpoint
    fleet = Bucket(job.url.rpartition("/")[0])
    done = threading.Event()
    keeper = threading.Thread(target=keep, args=(mirror, fleet, done), daemon=True)
    keeper.start()
    try:
        settings = {**job.settings, "output_dir": str(folder)}
        yield replace(job, run_dir=str(folder), settings=settings)
    finally:
        done.set()
        keeper.join()

    # send the last files; without them the run is not done
    try:
        mirror.push()
    except SupersededError:
        raise
    except UserError as error:
        there = f"All files of the run are in {folder}; the same command sends them from there."
        raise UserError(f"{error} {there}") from error
    shutil.rmtree(home, ignore_errors=True)


def scratch_home(url: str) -> Path:
    """A temporary folder of this user. Raises UserError when another user owns it."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    home = Path(tempfile.gettempdir()) / f"dreambooth_moslora-{user}"
    home.mkdir(mode=0o700, exist_ok=True)
    info = home.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != user:
        raise UserError(f"{home} is another's; set TMPDIR to a folder of your own.")
    return home / content_key(url=url)[:16]


def begin(mirror: Mirror, mark: str) -> None:
    """Fetch the bucket's files; keep a killed worker's own unless another machine has written
    since."""
    # the files here may be newer than the bucket's, if they are of this run
    unsent = mirror.folder / UNSENT
    record = records.read_record(mirror.folder)
    is_ours = record is not None and record.mark == mark and unsent.is_file()
    if not is_ours or read_manifest(mirror.bucket).writer not in ("", *unsent.read_text().split()):
        # they are not: take the bucket's instead
        for path in mirror.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != worker.HOLD_NAME:
                path.unlink()
        mirror.pull()

    # note every writer that may be in the manifest, before it is
    before = unsent.read_text() if unsent.is_file() else ""
    atomic_write(unsent, f"{before} {mirror.writer}")  # a claim may be taken without an answer
    mirror.claim()
    atomic_write(unsent, mirror.writer)


def keep(mirror: Mirror, fleet: Bucket, done: threading.Event) -> None:
    """Until `done`, push each new checkpoint and pass on a stop of the fleet. Failures are tried
    again later."""
    sent: tuple = ()
    sent_at = looked_at = float("-inf")
    while not done.wait(POLL_SEC):
        now = time.monotonic()
        try:
            # push for a new checkpoint, and now and then for the metrics
            found = run_folder.RunDir(mirror.folder).checkpoints()
            checkpoints = tuple((path.name, path.stat().st_mtime_ns) for path in found)
            if checkpoints != sent or now - sent_at > LEAST_OFTEN_SEC:
                try:
                    mirror.push()
                except SupersededError:
                    stop_here(mirror)
                sent = checkpoints
                sent_at = now

            # a stop of the fleet is a file beside the run folders
            if now - looked_at > LOOK_SEC:
                looked_at = now
                if fleet.exists(records.STOP_NAME):
                    stop_here(mirror)
        except (UserError, OSError):
            done.wait(LOOK_SEC)


def stop_here(mirror: Mirror) -> None:
    """Ask the training to end with a checkpoint. The parent folder holds only this run."""
    (mirror.folder.parent / records.STOP_NAME).touch()


@dataclass(frozen=True)
class RemoteFleet:
    """The driver's side: the local folder `view` looks like the fleet behind `bucket`."""

    bucket: Bucket
    view: Path

    def fetch(self, name: str) -> None:
        """Download the small files of a subject. An adapter is represented by an empty file."""
        bucket = self.bucket / name
        folder = self.view / name
        folder.mkdir(parents=True, exist_ok=True)
        files = read_manifest(bucket).files
        for viewed in VIEWED:
            if viewed == records.FLEET_NAME or viewed in files:
                bucket.download(viewed, folder / viewed)
        if run_folder.PUBLISHED_NAME in files:
            (folder / run_folder.PUBLISHED_NAME).touch()

    def fetch_all(self, names: Sequence[str] | None = None) -> None:
        """`fetch` these subjects, or those of the fleet's list. Raises UserError when there is
        none."""
        if names is None:
            self.bucket.download(records.FLEET_NAME, self.view / records.FLEET_NAME)
            try:
                names = records.read_names(self.view)
            except UserError as error:
                raise UserError(str(error).replace(str(self.view), self.bucket.url)) from error
        at_once(self.fetch, names)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Copy to the bucket what `fleet.begun` has written, and clear a stop before and after the
        block."""
        self.send(records.FLEET_NAME)
        self.bucket.remove(records.STOP_NAME)
        try:
            yield
        finally:
            # the block's ending is to be told, and the next fleet clears the stop too
            with suppress(UserError):
                self.bucket.remove(records.STOP_NAME)

    def send(self, name: str) -> None:
        self.bucket.write(name, (self.view / name).read_bytes())

    def check(self, run_dir: Path, result: records.Record | ray_fleet.Lost) -> records.Record:
        """Like `fleet.checked`, for files in the bucket; if they cannot be read, the worker's
        result counts."""
        try:
            self.fetch(run_dir.name)
            record = checked(run_dir, result, NOT_THERE)
        except UserError:
            record = checked(run_dir, result) if isinstance(result, ray_fleet.Lost) else result
        if record != records.read_record(run_dir):
            records.write_record(run_dir, record)
        return record

    def run(
        self,
        todo: Sequence[tuple[fleet_subjects.Subject, str]],
        view: Path,
        machines: Machines,
        on_end: Callable[[Ending], None],
        should_stop: Callable[[], bool] = bool,
    ) -> None:
        """Like `fleet.run_fleet`, with workers, a stop, and failures that go to the bucket.

        todo: subjects and their marks
        view: the folder of this driver
        machines: of the cluster
        on_end: called with an `Ending` for each subject
        should_stop: once it says so, running trainings end at a checkpoint and none begins
        """
        is_told = False  # whether the bucket knows of the stop

        def note(ending: Ending) -> None:
            if ending.record.state == "failed":
                with suppress(UserError):
                    self.note_failure(ending.name, ending.record)
            on_end(ending)

        def stop() -> bool:
            nonlocal is_told
            stopped = view / records.STOP_NAME
            if should_stop() and not stopped.exists():
                stopped.touch()
                # workers of this machine need not hear of it from the bucket
                for subject, _ in todo:
                    with suppress(UserError, OSError):
                        home = scratch_home(f"{self.bucket.url}/{subject.name}")
                        (home / records.STOP_NAME).touch()
            if stopped.exists() and not is_told:
                with suppress(UserError):  # tried again at the next call
                    self.bucket.write(records.STOP_NAME, b"\n")
                    is_told = True
            return stopped.exists()

        run_fleet(
            todo,
            view,
            machines,
            on_end=note,
            should_stop=stop,
            train=train_in_bucket,
            check=self.check,
            url=self.bucket.url,
        )

    def note_failure(self, name: str, record: records.Record) -> None:
        """Write the record into the bucket, where one that knows of no training replaces none."""
        bucket = self.bucket / name
        if record.starts or bucket.read(records.FLEET_NAME) is None:
            bucket.write(records.FLEET_NAME, (self.view / name / records.FLEET_NAME).read_bytes())

    def publish(self) -> str:
        """Upload the index, and the list again, as the bucket may have lost it. Returns the index's
        URL."""
        self.send(records.FLEET_NAME)
        self.send(records.INDEX_NAME)
        return f"{self.bucket.url}/{records.INDEX_NAME}"
