"""Of two real processes one fails or is killed: the other ends in one line, and what was saved stays."""

import json

import pytest

from dreambooth_moslora.disk.run_folder import RunDir
from tests.helpers.ranks import ended_ranks
from tests.helpers.tiny_training import paint_photos, tiny_config

pytestmark = pytest.mark.slow

GONE = "error: another process of this run has gone"


@pytest.fixture
def ends(tiny_base, tmp_path, free_port):
    """Play scenes, each in a folder of its own; returns the exit codes and words of both processes."""

    def play(*scenes: dict) -> list[tuple[int, str]]:
        photos, written = paint_photos(tmp_path / "photos"), []
        for number, scene in enumerate(scenes):
            config = tiny_config(tiny_base, photos, tmp_path / str(number), max_train_steps=3, checkpointing_steps=1)
            file = tmp_path / f"{number}.json"
            file.write_text(json.dumps(config.to_dict()))
            written.append({"config": str(file), **scene})
        (tmp_path / "scenes.json").write_text(json.dumps(written))
        return ended_ranks("tests.helpers.scenes", free_port, str(tmp_path / "scenes.json"))

    return play


def checkpoints(folder) -> list[str]:
    return [path.name for path in RunDir(folder).checkpoints()]


def test_what_the_main_process_cannot_write_ends_both_and_the_process_that_is_killed_the_other(ends, tmp_path):
    full, killed = {"rank": 0, "end": "full"}, {"place": "averaged", "rank": 1, "after": 1, "end": "kill"}
    scenes = {"place": "started", "after": 0, **full}, {"place": "reported", "after": 1, **full}, killed
    (_, main_said), (other_code, other_said) = ends(*scenes)
    main, other = (json.loads((tmp_path / f"scenes_{rank}.json").read_text()) for rank in (0, 1))
    assert [scene["code"] for scene in main] == [2, 2, 2], main_said
    assert [scene["code"] for scene in other] == [2, 2] and other_code == -9, other_said
    assert other_said.count("error: the main process ended: [Errno 28]") == 2
    assert main_said.count(GONE) == 1 and "Traceback" not in main_said + other_said
    assert [checkpoints(tmp_path / name) for name in "012"] == [[], ["checkpoint-1", "checkpoint-2"], ["checkpoint-1"]]


def test_the_others_end_in_a_line_when_the_main_process_is_killed(ends, tmp_path):
    (main_code, _), (_, said) = ends({"place": "averaged", "rank": 0, "after": 1, "end": "kill"})
    (scene,) = json.loads((tmp_path / "scenes_1.json").read_text())
    assert main_code == -9 and scene["code"] == 2, said
    assert said.count(GONE) == 1 and "Traceback" not in said
    assert checkpoints(tmp_path / "0") == ["checkpoint-1"]
