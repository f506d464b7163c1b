"""A fleet on Ray with a server that speaks S3: a worker and its training are killed, uploads fail,
no byte differs."""

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from urllib.request import Request, urlopen

import psutil
import pytest

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.cluster import bucket, remote_output
from dreambooth_moslora.extras.cluster.bucket import TRIES, Bucket, read_manifest
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.extra("ray", "s3fs", "moto", "flask", "flask_cors")]
GUARDED, STEPS, SHORT_SEC = "dreambooth_moslora.extras.cluster.worker", 40, 0.05
TOLD = (
    *(
        "pretrained_model_name_or_path",
        "resolution",
        "target_modules",
        "train_batch_size",
        "max_train_steps",
    ),
    *(
        "learning_rate",
        "num_validation_images",
        "report_to",
        "seed",
        "checkpointing_steps",
        "checkpoints_total_limit",
    ),
)


@contextmanager
def serving(application: Callable) -> Iterator[str]:
    """The address of a server of this WSGI application. The next one is asked anew: fsspec keeps
    file systems."""
    from s3fs import S3FileSystem
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", address := f"http://127.0.0.1:{server.port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "key")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setattr(bucket, "FIRST_WAIT_SEC", SHORT_SEC)
            yield address
    finally:
        server.shutdown()
        thread.join()
        S3FileSystem.clear_instance_cache()


def refusing(environ, start_response) -> list[bytes]:
    start_response("503 Service Unavailable", [("Connection", "close")])
    return [b""]


def flaky_s3(away: threading.Event) -> Callable:
    """S3 (moto). It refuses the first of seven uploads when half of it has come, and while it is
    `away` all."""
    from moto.server import DomainDispatcherApplication, create_backend_app

    whole, numbers = DomainDispatcherApplication(create_backend_app), count()

    def application(environ, start_response):
        if away.is_set():
            return refusing(environ, start_response)
        if (
            environ["REQUEST_METHOD"] == "PUT"
            and environ["PATH_INFO"].count("/") > 1
            and next(numbers) % 7 == 0
        ):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
            return refusing(environ, start_response)
        return whole(environ, start_response)

    return application


@pytest.fixture
def away():
    """While it is set, the server refuses all."""
    return threading.Event()


@pytest.fixture
def s3(away, monkeypatch):
    """A URL in a bucket, which the fleet's workers wait for as shortly as this process."""

    def train_in_bucket(job):  # in Ray's process
        bucket.FIRST_WAIT_SEC = remote_output.LOOK_SEC = SHORT_SEC
        return remote_output.train_in_bucket(job)

    monkeypatch.setattr(remote_output, "train_in_bucket", train_in_bucket)
    # Ray's sockets lie there: their paths are short.
    with serving(flaky_s3(away)) as address, tempfile.TemporaryDirectory(prefix="s3-") as scratch:
        # its buckets are the process's
        urlopen(Request(f"{address}/moto-api/reset", method="POST")).close()
        monkeypatch.setenv("TMPDIR", scratch)
        monkeypatch.setattr(tempfile, "tempdir", scratch)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        Bucket("s3://fleets").files.mkdir("fleets")
        yield "s3://fleets/toys"


def test_a_store_that_refuses_all_is_asked_as_often_as_said():
    asked = []
    refuse = lambda environ, answer: asked.append(environ) or refusing(environ, answer)  # noqa: E731
    with serving(refuse), pytest.raises(UserError, match=f"{TRIES} times"):
        Bucket("s3://fleets/refused").write("a", b"x")
    assert len(asked) == TRIES


def lose_the_machine(url: str, killed: list) -> None:
    """When the bucket has a new checkpoint of rex: its training and its worker are gone at once.

    The training is held at that checkpoint: it might end before the bucket has it.
    """
    while not (found := trainings_of("rex")):
        time.sleep(0.1)
    run = RunDir(Path(found[0].cmdline()[-1]).parent)
    before = run.checkpoints()
    while run.checkpoints() == before:
        time.sleep(0.01)
    found[0].suspend()
    newest, worker = run.checkpoints()[-1].name, worker_of(found[0])
    while not any(name.startswith(f"{newest}/") for name in read_manifest(Bucket(url)).files):
        time.sleep(0.1)
    for process in (found[0], worker):
        process.kill()
    killed.append(worker.pid)


def trainings_of(place: Path | str) -> list[psutil.Process]:
    """The processes that a fleet's workers have begun in such a run folder."""
    running = [
        (process, process.info["cmdline"] or [""]) for process in psutil.process_iter(["cmdline"])
    ]
    return [
        process
        for process, words in running
        if GUARDED in words and words[-1].endswith(f"{place}/job_config.json")
    ]


def worker_of(training: psutil.Process) -> psutil.Process:
    words = training.cmdline()
    return psutil.Process(int(words[words.index(GUARDED) + 1]))


def command_for(base: Path, photos: Path, folder: Path, url: str) -> list[str]:
    """A fleet of the folders in `photos`; its settings are those of `rex` alone."""
    often = {"checkpointing_steps": 1, "checkpoints_total_limit": 2}
    config = tiny_config(base, photos / "rex", folder, max_train_steps=STEPS, **often)
    text = "".join(f"{name} = {json.dumps(getattr(config, name))}\n" for name in TOLD)
    (folder / "fleet.toml").write_text(text)
    command = ["fleet", str(photos), "--out", url, "--config", str(folder / "fleet.toml")]
    return [*command, "--instance_prompt", config.instance_prompt]


def sha256_in(url: str, folder: Path) -> str:
    """Of the adapter in a bucket (`adapter_sha256`)."""
    folder.mkdir()
    assert Bucket(url).download(PUBLISHED_NAME, folder / PUBLISHED_NAME)
    return adapter_sha256(folder)


def lose_the_bucket_and_stop(away: threading.Event) -> None:
    """At rex's second checkpoint the bucket goes, and somebody presses Ctrl-C."""
    while not list(Path(tempfile.gettempdir()).glob("dreambooth_moslora-*/*/rex/checkpoint-2")):
        time.sleep(0.01)
    away.set()
    os.kill(os.getpid(), signal.SIGINT)


def test_a_fleet_in_a_bucket_that_is_stopped_and_loses_a_machine_ends_equal_to_plain_trainings(
    s3, away, tiny_base, tmp_path, capfd
):
    from dreambooth_moslora.training.loop import train

    photos, killed = tmp_path / "photos", []
    paint_photos(photos / "rex", 2)
    command = command_for(tiny_base, photos, tmp_path, s3)
    threading.Thread(target=lose_the_bucket_and_stop, args=(away,), daemon=True).start()
    assert main(command) == 130
    told = capfd.readouterr().err
    assert "rex: interrupted: " in told and "the same command sends them from there" in told
    assert told.endswith("stopped; the same command continues\n") and "Traceback" not in told
    away.clear()
    (photos / "void").mkdir()
    threading.Thread(target=lose_the_machine, args=(f"{s3}/rex", killed), daemon=True).start()
    assert main(command) == 1
    told = capfd.readouterr()
    assert (
        "rex: its worker was killed; it continues elsewhere" in told.err
        and "void: FAILED" in told.err
    )
    assert killed and told.out.endswith(f"{s3}/index.html\n")
    train(tiny_config(tiny_base, photos / "rex", tmp_path / "alone" / "rex", max_train_steps=STEPS))
    assert sha256_in(f"{s3}/rex", tmp_path / "got") == adapter_sha256(tmp_path / "alone" / "rex")
    assert not list(Path(tempfile.gettempdir()).glob("dreambooth_moslora-*/*"))
    assert main(["fleet", "status", s3]) == 0
    assert "2 subjects: 1 failed, 1 done" in capfd.readouterr().out
    assert main(["fleet", "status", "s3://nowhere/toys"]) == 2
    assert capfd.readouterr().err.count("\n") == 1
