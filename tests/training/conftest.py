"""Fixtures and helpers that several tests of training share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.generation import sampling
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.plan.distributed import make_accelerator
from dreambooth_moslora.training import reporter
from dreambooth_moslora.training.prepare import TrainInputs, prepare_inputs
from tests.helpers.tiny import save_tiny_sdxl
from tests.helpers.tiny_training import paint_photos, tiny_config

ROOT = Path(__file__).parents[2]
MODULE = "tests.helpers.scenes"
FEW = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return paint_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Save a base for the module alone: its tokenizers get new words."""
    return save_tiny_sdxl(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def two_steps():
    """The pictures that a run of any family draws, in two denoising steps: the program asks for 25,
    and for 50."""
    generate_pixels = sampling.generate_pixels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sampling,
            "generate_pixels",
            lambda *arguments, **options: generate_pixels(*arguments, **options | FEW),
        )
        yield


@pytest.fixture
def prepare_base(photos, tmp_path) -> Callable[..., TrainInputs]:
    """Prepare a run on a base, with the caches of the runs before; returns its inputs."""

    def prepare_base(base, **changes):
        caches = {"caching": "disk", "cache_dir": str(tmp_path / "caches")}
        config = tiny_config(base, photos, tmp_path / "run", **caches, **changes)
        run_dir = RunDir(tmp_path / "run")
        accelerator = make_accelerator(config, run_dir)
        report = reporter.Reporter(run_dir, accelerator, None)
        context = reporter.RunContext(run_dir, accelerator, report, lambda: False)
        found_photos = find_photos(photos, config.instance_prompt, 64).photos
        return prepare_inputs(
            config, Base.of(config), context, found_photos, sample_count=1, prompts=[]
        )

    return prepare_base


@pytest.fixture
def play(tmp_path, free_port) -> Callable[..., tuple]:
    """Play scenes, with flags or a configuration for all, in real processes. `launch` starts them,
    or they are started as by a launcher that would not end the others with the first. Returns each
    one's exit code and words, and what became of each scene in each that was not killed while it
    played the first."""

    def play(
        scenes: list[dict], count: int = 2, launch: tuple[str, ...] = ()
    ) -> tuple[list, list[list[dict]]]:
        for number, scene in enumerate(scenes):
            if "config" in scene:
                config = tmp_path / f"{number}.json"
                config.write_text(json.dumps(scene.pop("config").to_dict()))
                scene["flags"] = [["--config", str(config)]] * count
        file = tmp_path / "scenes.json"
        file.write_text(json.dumps(scenes))
        command = [sys.executable, "-m", *(launch or [MODULE]), str(file)]
        started = [start(command, rank, count, free_port) for rank in range(1 if launch else count)]
        try:
            outputs = [process.communicate(timeout=600)[1] for process in started]
        finally:
            for process in started:
                process.kill()
        result_paths = [file.with_name(f"scenes_{rank}.json") for rank in range(count)]
        ended = [
            (process.returncode, output) for process, output in zip(started, outputs, strict=True)
        ]
        return ended, [
            json.loads(file.read_text()) if file.exists() else [] for file in result_paths
        ]

    return play


def stop_at(step: int) -> tuple[Callable, Callable]:
    """(on_event, should_stop): the first hears the events, the second says so once `step` is
    done."""
    done = []
    return (lambda event: done.append(event.step if event.kind == "step" else None)), (
        lambda: step in done
    )


def flipped(content: bytes, place: int) -> bytes:
    """With another last bit of the byte there."""
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def start(command: list[str], rank: int, count: int, port: int) -> subprocess.Popen[str]:
    """On the CPU, as one of several; a launcher gives its own processes their own numbers."""
    ranks = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_PORT": port,
    }
    fixed = {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **fixed, **{name: str(value) for name, value in ranks.items()}}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
