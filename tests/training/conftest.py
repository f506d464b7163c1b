"""What several tests of training begin with."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.ranks import ended_ranks
from tests.helpers.tiny import save_tiny_sdxl
from tests.helpers.tiny_training import paint_photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return paint_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base of its own, whose tokenizers get new words."""
    return save_tiny_sdxl(tmp_path_factory.mktemp("base"))


@pytest.fixture
def play(tmp_path, free_port) -> Callable[..., tuple]:
    """Play scenes, with configurations in them, in two real processes of a module of helpers; returns each process's
    exit code and words, and what became of each scene in each process that was not killed while it played the first."""

    def play(scenes: list[dict], module: str = "scenes", left: str = "scenes") -> tuple:
        for number, scene in enumerate(scenes):
            if "config" in scene:
                (tmp_path / f"{number}.json").write_text(json.dumps(scene["config"].to_dict()))
                scene["config"] = str(tmp_path / f"{number}.json")
        (tmp_path / "scenes.json").write_text(json.dumps(scenes))
        ended = ended_ranks(f"tests.helpers.{module}", free_port, str(tmp_path / "scenes.json"))
        files = [tmp_path / f"{left}_{rank}.json" for rank in (0, 1)]
        return ended, [json.loads(file.read_text()) if file.exists() else [] for file in files]

    return play
