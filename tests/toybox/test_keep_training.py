"""The background training of the base's UNet: from the assets alone, in legs on fresh renders, and
on after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageStat
from safetensors.torch import load_file

from toybox.data.renders import Renders
from toybox.keep_training import (
    BASE,
    ROOT,
    Settings,
    encode_shards,
    keep_training,
    main,
    make_renders,
    render_missing,
)
from toybox.learning.training import read_saved_step
from toybox.world import Scene

TINY = Settings(steps=6, batch=2, leg=2, shards=2, fresh=1, pictures=3, sheet_every=4, processes=1)
SHORT = replace(TINY, steps=4)
FLAGS = [word for name, value in asdict(TINY).items() for word in (f"--{name}", str(value))]


def files(state: Path) -> list[str]:
    return sorted(
        path.name for path in [*(state / "toys").iterdir(), *(state / "latents").iterdir()]
    )


def window(*numbers: int) -> list[str]:
    names = (
        (f"{n:04d}.safetensors", f"images_{n:04d}.npy", f"scenes_{n:04d}.jsonl") for n in numbers
    )
    return sorted(name for of_shard in names for name in of_shard)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """The state of a tiny training that went through without a stop."""
    state = tmp_path_factory.mktemp("unbroken")
    keep_training(state, SHORT)
    return state


def weights(state: Path) -> dict[str, torch.Tensor]:
    return load_file(state / "unet" / "model" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_it_trains_the_shipped_unet_on_and_draws_a_sheet(unbroken):
    before, after = (
        load_file(BASE / "unet" / "diffusion_pytorch_model.safetensors"),
        weights(unbroken),
    )
    change = max(
        (after[name].float() - value.float()).abs().max() for name, value in before.items()
    )
    assert before.keys() == after.keys() and 0 < change < 0.05
    rows = [json.loads(line) for line in (unbroken / "unet" / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["seen"]) for row in rows] == [(2, 4), (4, 8)]
    (path,) = (unbroken / "sheets").iterdir()
    with Image.open(path) as picture:
        assert path.name == "00004.png" and picture.size == (640, 640)
        assert min(ImageStat.Stat(picture).stddev) > 20


@pytest.mark.slow
def test_each_leg_adds_fresh_renders_and_keeps_the_newest(tmp_path, unbroken):
    make_renders(tmp_path, TINY, leg=0)
    assert files(tmp_path) == window(0, 1)
    second = [tmp_path / name for name in ("toys/images_0001.npy", "latents/0001.safetensors")]
    before = [path.read_bytes() for path in second]
    make_renders(tmp_path, TINY, leg=1)
    assert files(tmp_path) == window(1, 2) and [path.read_bytes() for path in second] == before
    latents = [load_file(tmp_path / "latents" / f"000{n}.safetensors")["latents"] for n in (1, 2)]
    assert latents[0].shape == (3, 4, 16, 16) and not torch.equal(*latents)
    shards = [
        json.loads(line)["pictures"]
        for line in (tmp_path / "renders.jsonl").read_text().splitlines()
    ]
    assert shards == [6, 3]
    assert files(unbroken) == window(1, 2)


@pytest.mark.slow
def test_latents_are_the_teachers_and_narrow_has_one_camera(tmp_path, unbroken):
    vae = AutoencoderKL.from_pretrained(BASE / "vae", torch_dtype=torch.float16)
    vae.register_to_config(scaling_factor=2 * vae.config.scaling_factor)
    vae.save_pretrained(tmp_path / "base" / "vae")
    with_teacher = replace(TINY, teacher=str(tmp_path / "base"))
    shutil.copytree(unbroken / "toys", tmp_path / "toys")
    encode_shards(tmp_path, with_teacher, with_teacher.list_shards(1))
    name = "latents/0001.safetensors"
    doubled, usual = (load_file(state / name)["latents"] for state in (tmp_path, unbroken))
    torch.testing.assert_close(doubled, 2 * usual, rtol=0.01, atol=0.01)
    render_missing(tmp_path / "fixed", replace(TINY, narrow=1), range(1))
    pitches = [row["scene"]["pitch"] for row in Renders(tmp_path / "fixed" / "toys").rows]
    assert pitches == [Scene.pitch] * TINY.pictures


def test_what_is_left_to_render_is_counted_by_whole_legs():
    settings = replace(TINY, steps=7)
    assert [settings.count_later_images(step) for step in (0, 1, 2, 5, 6)] == [9, 9, 6, 3, 0]


def call(capsys, *arguments: object) -> str:
    main([str(word) for word in arguments])
    return capsys.readouterr().out.strip()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


KEEP = """
import json
import sys
from pathlib import Path
from toybox.keep_training import Settings, keep_training
keep_training(Path(sys.argv[1]), Settings(**json.loads(sys.argv[2])))
"""


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_unbroken_ones_weights(tmp_path, unbroken):
    command = [sys.executable, "-c", KEEP, str(tmp_path), json.dumps(asdict(SHORT))]
    killed = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        wait_for(lambda: read_saved_step(tmp_path / "unet") >= 2)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    keep_training(tmp_path, SHORT)
    assert all(
        torch.equal(value, weights(unbroken)[name]) for name, value in weights(tmp_path).items()
    )


def test_a_session_of_lowest_priority_pauses_goes_on_and_stops(tmp_path, capsys):
    assert call(capsys, tmp_path, *FLAGS).startswith("started")
    pid = int((tmp_path / "pid").read_text())
    try:
        assert os.getpriority(os.PRIO_PROCESS, pid) == 19
        assert os.getsid(pid) == os.getpgid(pid) == pid
        group = Path(f"/proc/{pid}/autogroup")
        assert not group.exists() or group.read_text().split()[-1] == "19"
        assert call(capsys, tmp_path).startswith("runs:")
        assert call(capsys, tmp_path, "--pause") == "paused"
        wait_for(lambda: call(capsys, tmp_path).startswith("paused:"))
        assert call(capsys, tmp_path, "--go_on") == "goes on" and call(capsys, tmp_path).startswith(
            "runs:"
        )
        call(capsys, tmp_path, "--pause")
        assert call(capsys, tmp_path, "--stop") == "stopped"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_mistakes_are_told_in_a_line(tmp_path):
    for arguments, message in (
        ((ROOT / "runs",), "choose a folder outside the repository"),
        ((tmp_path, "--pause"), "--pause: no training runs there"),
        ((tmp_path / "odd", "--batch", "3"), "--batch 3: 2 processes cannot share it evenly"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([str(word) for word in arguments])
    (tmp_path / "settings.json").write_text(json.dumps({"batch": 64}))
    with pytest.raises(SystemExit, match=r"--batch 32: .* has 64; take another STATE"):
        main([str(tmp_path), "--batch", "32"])
