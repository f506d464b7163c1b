"""Class images, encodings and samples are shared out to the processes: their files are those of one process.

Two real processes play several scenes, in which one fails or is stopped in the midst of its share. The last scene that
is not killed goes on with what the others left.
"""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.training.loop import train
from tests.helpers.ranks import ended_ranks
from tests.helpers.scenes import quick_call
from tests.helpers.tiny_training import paint_photos, tiny_config

pytestmark = pytest.mark.slow

SCENES = {
    "class images": {"place": "drawn", "rank": 1, "after": 1, "end": "full"},
    "class images, stopped": {"place": "drawn", "rank": 0, "after": 1, "end": "stop"},
    "encodings": {"place": "encoded", "rank": 0, "after": 1, "end": "full"},
    "samples": {"place": "sampled", "rank": 1, "after": 0, "end": "full"},
    "checkpoint": {"place": "saved", "rank": 0, "after": 0, "end": "full"},
    "whole": {},
    "killed": {"place": "drawn", "rank": 1, "after": 0, "end": "kill"},
}
CHANGES = {"with_prior_preservation": True, "num_class_images": 5, "sample_batch_size": 1, "num_validation_images": 3}
CHANGES |= {"max_train_steps": 2, "caching": "disk", "crops_per_photo": 2}


def digests(folder: Path, pattern: str = "**/*") -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }


@pytest.fixture
def quick(monkeypatch):
    """As the two processes are: three denoising steps, one thread."""
    monkeypatch.setattr(StableDiffusionXLPipeline, "__call__", quick_call)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_processes_share_the_work_and_leave_the_files_of_one(tiny_base, tmp_path, free_port, quick):
    photos = paint_photos(tmp_path / "photos")

    def config(name: str, **changes):
        cache_dir = str(tmp_path / f"{name}_cache")
        return tiny_config(tiny_base, photos, tmp_path / name, cache_dir=cache_dir, **CHANGES, **changes)

    scenes = []
    for name, scene in SCENES.items():
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(config("killed" if name == "killed" else "two").to_dict()))
        scenes.append({"config": str(file), **scene})
    (tmp_path / "scenes.json").write_text(json.dumps(scenes))
    (main_code, main_said), (other_code, other_said) = ended_ranks(
        "tests.helpers.scenes", free_port, str(tmp_path / "scenes.json")
    )
    main, other = (json.loads((tmp_path / f"scenes_{rank}.json").read_text()) for rank in (0, 1))

    assert [scene["code"] for scene in main] == [2, 130, 2, 2, 2, 0, 2], main_said + other_said
    assert [scene["code"] for scene in other] == [2, 130, 2, 2, 2, 0], main_said + other_said
    assert main_code == 0 and other_code == -9
    errors = [line for line in main_said.splitlines() if line.startswith("error: ")]
    assert "process 1 ended: [Errno 28]" in errors[0] and "process 1 ended: [Errno 28]" in errors[2]
    assert len(errors) == 5 and "another process of this run has gone" in errors[4]
    assert other_said.count("error: the main process ended: [Errno 28]") == 2
    assert "Traceback" not in main_said + other_said

    train(config("one", gradient_accumulation_steps=2))
    for pattern in ("class_images/*", "samples/step_000000_*"):
        assert digests(tmp_path / "two", pattern) == digests(tmp_path / "one", pattern) != {}
    assert digests(tmp_path / "two_cache") == digests(tmp_path / "one_cache") != {}
    assert share_of_each(main, other, "drawn") == [[2, 1], [2, 1], [1, 0], [0, 0], [0, 0], [0, 0]]
    keys = [key for rank in (main, other) for scene in rank for key in scene["encoded"]]
    assert len(keys) == len(set(keys)) and min(share_of_each(main, other, "encoded")[3]) > 2

    shutil.copytree(tmp_path / "two", tmp_path / "again")
    for drawn in [*(tmp_path / "again").glob("image_*.png"), *RunDir(tmp_path / "again").samples_dir.iterdir()]:
        drawn.unlink()
    train(config("again", resume_from_checkpoint="latest"))
    for pattern in ("samples/step_000002_*.png", "image_*.png"):
        assert digests(tmp_path / "two", pattern) == digests(tmp_path / "again", pattern) != {}


def share_of_each(main: list[dict], other: list[dict], place: str) -> list[list[int]]:
    """How much each process did there in each scene."""
    return [[len(one[place]), len(two[place])] for one, two in zip(main, other)]
