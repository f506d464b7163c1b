"""A fleet on Ray with a server that speaks S3: a worker and its training are killed, uploads fail, no byte differs."""

import json
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from dreambooth_moslora.cli.main import main
from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RunDir
from dreambooth_moslora.extras.cluster.bucket import TRIES, Bucket, read_manifest
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.extra("ray", "s3fs", "moto", "flask", "flask_cors")]
GUARDED, STEPS = "dreambooth_moslora.extras.cluster.worker", 40
TOLD = (
    *("pretrained_model_name_or_path", "resolution", "target_modules", "train_batch_size", "max_train_steps"),
    *("learning_rate", "num_validation_images", "report_to", "seed", "checkpointing_steps", "checkpoints_total_limit"),
)


@pytest.fixture
def away():
    """While it is set, the server refuses all."""
    return threading.Event()


@pytest.fixture
def s3(away, monkeypatch):
    from tests.helpers.s3_server import s3_server

    # Ray's sockets lie there: their paths are short.
    with s3_server(every=7, away=away) as address, tempfile.TemporaryDirectory(prefix="s3-") as scratch:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("TMPDIR", scratch)
        monkeypatch.setattr(tempfile, "tempdir", scratch)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        Bucket("s3://fleets").files.mkdir("fleets")
        yield "s3://fleets/toys"


def test_a_store_that_refuses_all_is_asked_as_often_as_said(monkeypatch):
    from dreambooth_moslora.extras.cluster import bucket as bucket_module
    from tests.helpers.s3_server import serving

    asked = []

    def refuse(environ, start_response):
        asked.append(environ["PATH_INFO"])
        start_response("503 Service Unavailable", [])
        return [b""]

    monkeypatch.setattr(bucket_module, "FIRST_WAIT_SEC", 0.001)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with serving(refuse) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        with pytest.raises(UserError, match=f"{TRIES} times"):
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
    newest = run.checkpoints()[-1].name
    worker = psutil.Process(int(found[0].cmdline()[found[0].cmdline().index(GUARDED) + 1]))
    while not any(name.startswith(f"{newest}/") for name in read_manifest(Bucket(url)).files):
        time.sleep(0.1)
    for process in (found[0], worker):
        process.kill()
    killed.append(worker.pid)


def trainings_of(name: str) -> list[psutil.Process]:
    running = [(process, process.info["cmdline"] or [""]) for process in psutil.process_iter(["cmdline"])]
    return [process for process, words in running if GUARDED in words and words[-1].endswith(f"{name}/job_config.json")]


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


def test_a_fleet_in_a_bucket_that_is_stopped_without_it_and_loses_a_machine_ends_equal_to_trainings_without_it(
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
    assert "rex: its worker was killed; it continues elsewhere" in told.err and "void: FAILED" in told.err
    assert killed and told.out.endswith(f"{s3}/index.html\n")
    train(tiny_config(tiny_base, photos / "rex", tmp_path / "alone" / "rex", max_train_steps=STEPS))
    assert sha256_in(f"{s3}/rex", tmp_path / "got") == adapter_sha256(tmp_path / "alone" / "rex")
    assert not list(Path(tempfile.gettempdir()).glob("dreambooth_moslora-*/*"))
    assert main(["fleet", "status", s3]) == 0
    assert "2 subjects: 1 failed, 1 done" in capfd.readouterr().out
    assert main(["fleet", "status", "s3://nowhere/toys"]) == 2
    assert capfd.readouterr().err.count("\n") == 1
