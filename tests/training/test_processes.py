"""Real processes: launched, sharing the work, ending together."""

import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.training import loop
from dreambooth_moslora.training.loop import train
from tests.helpers.scenes import Watched, quick_call
from tests.helpers.tiny_training import (
    adapter_sha256,
    largest_difference,
    logged,
    paint_photos,
    tiny_config,
)
from tests.training.conftest import MODULE, ROOT

pytestmark = pytest.mark.slow

GONE = "another process of this run has gone"
LAUNCH = ["accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in logged(folder)]


@pytest.fixture
def watched(monkeypatch):
    """The steps of the trainings in this process."""
    monkeypatch.setattr(loop, "TrainStep", Watched)
    return Watched.instances


def test_two_processes_equal_one_with_accumulation(tiny_base, tmp_path, play, watched):
    tables = [
        {
            "instance_data_dir": str(paint_photos(tmp_path / kind, count)),
            "instance_prompt": f"a photo of {token} {kind}",
            "class_prompt": f"a photo of a {kind}",
        }
        for token, kind, count in (("sks", "dog", 3), ("zwx", "cat", 1), ("ohwx", "bear", 2))
    ]
    changes = {
        "subjects": tables,
        "with_prior_preservation": True,
        "prior": "adapter_off",
        "max_train_steps": 4,
    }
    changes |= {"train_batch_size": 2, "lr_scheduler": "linear", "lr_warmup_steps": 2}
    changes |= {"caption_dropout": 0.5}
    run_scene = {"config": tiny_config(tiny_base, None, tmp_path / "2", **changes)}
    ended, played = play([run_scene], launch=(*LAUNCH, "--multi_gpu", "--module", MODULE))
    ((main,), (second,)) = played
    assert main["adapter"] == second["adapter"] and ended[0][0] == main["code"] == 0, ended
    train(tiny_config(tiny_base, None, tmp_path / "1", gradient_accumulation_steps=2, **changes))
    shown_batches = sorted(tuple(note) for (scene,) in played for note in scene["shown"])
    assert shown_batches == watched[-1].shown
    classes = [prompt for _, prompts, _ in shown_batches for prompt in prompts[2:]]
    assert len(classes) == 16 and all(len(set(classes[at : at + 3])) == 3 for at in range(0, 15, 3))
    assert [logged(tmp_path / count, "start")[0]["processes"] for count in "21"] == [2, 1]
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)
    assert largest_difference(tmp_path / "2", tmp_path / "1") < 1e-5


def test_two_processes_with_streaming_learn_equal_adapter(tiny_base, photos, tmp_path, play):
    """Each streams its own: only gradients are shared, which are the same bit for bit. In bf16 no
    weight lies as in the file, where few are aligned."""
    changes = {"max_train_steps": 2, "gradient_checkpointing": True, "mixed_precision": "bf16"}
    changes |= {"with_prior_preservation": True, "prior": "adapter_off", "class_prompt": "a dog"}
    runs = {name: {"stream_blocks": name == "streamed"} for name in ("whole", "streamed")}
    scenes = []
    for name, own_changes in runs.items():
        scenes.append(
            {"config": tiny_config(tiny_base, photos, tmp_path / name, **changes, **own_changes)}
        )
    ended, played = play(scenes)
    assert [code for code, _ in ended] == [0, 0], ended
    assert len({scene["adapter"] for of_one in played for scene in of_one}) == 1
    assert adapter_sha256(tmp_path / "streamed") == adapter_sha256(tmp_path / "whole")
    assert [logged(tmp_path / name, "start")[0]["processes"] for name in runs] == [2, 2]


def test_launched_on_cpus_without_mpi_it_is_one_process(tiny_base, photos, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps(
            tiny_config(tiny_base, photos, tmp_path / "launched", max_train_steps=1).to_dict()
        )
    )
    command = [
        sys.executable,
        "-m",
        *LAUNCH,
        "--cpu",
        str(ROOT / "train_dreambooth.py"),
        "--config",
        str(file),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    train(tiny_config(tiny_base, photos, tmp_path / "plain", max_train_steps=1))
    assert adapter_sha256(tmp_path / "launched") == adapter_sha256(tmp_path / "plain")


SCENES = {
    "class images": {"place": "drawn", "rank": 1, "after": 1, "end": "full"},
    "class images, stopped": {"place": "drawn", "rank": 0, "after": 1, "end": "stop"},
    "encodings": {"place": "encoded", "rank": 0, "after": 1, "end": "full"},
    "samples": {"place": "sampled", "rank": 1, "after": 0, "end": "full"},
    "checkpoint": {"place": "saved", "rank": 0, "after": 0, "end": "full"},
    "whole": {},
    "killed": {"place": "drawn", "rank": 1, "after": 0, "end": "kill"},
}

CHANGES = {
    "with_prior_preservation": True,
    "num_class_images": 5,
    "sample_batch_size": 1,
    "num_validation_images": 3,
}
CHANGES |= {"max_train_steps": 2, "caching": "disk", "crops_per_photo": 2}


def digests(folder: Path, pattern: str = "**/*") -> dict[str, str]:
    paths = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture
def quick(monkeypatch):
    """As the two processes are: three denoising steps, one thread."""
    monkeypatch.setattr(StableDiffusionXLPipeline, "__call__", quick_call)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_processes_share_the_work_and_leave_the_files_of_one(
    tiny_base, photos, tmp_path, play, quick
):
    """In several scenes one fails or is stopped in the midst of its share of class images,
    encodings and samples. The last scene that is not killed goes on with what the others left."""

    def config(name: str, **changes):
        cache_dir = str(tmp_path / f"{name}_cache")
        return tiny_config(
            tiny_base, photos, tmp_path / name, cache_dir=cache_dir, **CHANGES, **changes
        )

    scenes = [
        {"config": config("killed" if name == "killed" else "two"), **SCENES[name]}
        for name in SCENES
    ]
    ((main_code, main_said), (other_code, other_said)), (main, second) = play(scenes)

    assert [scene["code"] for scene in main] == [2, 130, 2, 2, 2, 0, 2], main_said + other_said
    assert [scene["code"] for scene in second] == [2, 130, 2, 2, 2, 0], main_said + other_said
    assert main_code == 0 and other_code == -9
    errors = [line for line in main_said.splitlines() if line.startswith("error: ")]
    assert "process 1 ended: [Errno 28]" in errors[0] and "process 1 ended: [Errno 28]" in errors[2]
    assert len(errors) == 5 and GONE in errors[4]
    assert other_said.count("error: the main process ended: [Errno 28]") == 2
    assert "Traceback" not in main_said + other_said

    train(config("one", gradient_accumulation_steps=2))
    for pattern in ("class_images/*", "samples/step_000000_*"):
        assert digests(tmp_path / "two", pattern) == digests(tmp_path / "one", pattern) != {}
    assert digests(tmp_path / "two_cache") == digests(tmp_path / "one_cache") != {}
    assert count_shares(main, second, "drawn") == [[2, 1], [2, 1], [1, 0], [0, 0], [0, 0], [0, 0]]
    keys = [key for rank in (main, second) for scene in rank for key in scene["encoded"]]
    assert len(keys) == len(set(keys)) and min(count_shares(main, second, "encoded")[3]) > 2

    shutil.copytree(tmp_path / "two", tmp_path / "again")
    for image_path in [
        *(tmp_path / "again").glob("image_*.png"),
        *RunDir(tmp_path / "again").samples_dir.iterdir(),
    ]:
        image_path.unlink()
    train(config("again", resume_from_checkpoint="latest"))
    for pattern in ("samples/step_000002_*.png", "image_*.png"):
        assert digests(tmp_path / "two", pattern) == digests(tmp_path / "again", pattern) != {}


def count_shares(main: list[dict], second: list[dict], place: str) -> list[list[int]]:
    """How much each process did there in each scene."""
    return [[len(main_scene[place]), len(two[place])] for main_scene, two in zip(main, second)]


def checkpoints(folder) -> list[str]:
    return [path.name for path in RunDir(folder).list_checkpoints()]


@pytest.fixture
def short(tiny_base, photos, tmp_path):
    """A run of three steps in a folder of this name."""
    return lambda name: tiny_config(
        tiny_base, photos, tmp_path / name, max_train_steps=3, checkpointing_steps=1
    )


def test_stop_write_error_or_kill_ends_both_processes(play, short, tmp_path):
    """The other hears the stop while photos are encoded. What a library warns of the main process
    alone shows."""
    full = {"rank": 0, "end": "full"}
    scenes = [
        {"config": short("stopped"), "place": "encoded", "rank": 1, "after": 0, "end": "stop"},
        {"config": short("0"), "place": "started", "after": 0, **full},
        {"config": short("1"), "place": "reported", "after": 1, **full},
        {"config": short("2"), "place": "averaged", "rank": 0, "after": 1, "end": "kill"},
    ]
    ((main_code, main_said), (other_code, other_said)), (main, second) = play(scenes)
    assert [scene["code"] for scene in main] == [130, 2, 2] and main_code == -9, main_said
    assert [scene["code"] for scene in second] == [130, 2, 2, 2] and other_code == 0, other_said
    assert "stopped before the first step" in main_said
    assert ["every process says: encoded" in output for output in (main_said, other_said)] == [
        True,
        False,
    ]
    assert other_said.count("error: the main process ended: [Errno 28]") == 2
    assert other_said.count(f"error: {GONE}") == 1 and "Traceback" not in main_said + other_said
    checkpoint_names = [checkpoints(tmp_path / name) for name in ("stopped", *"012")]
    assert checkpoint_names == [[], [], ["checkpoint-1", "checkpoint-2"], ["checkpoint-1"]]


def test_smaller_card_decides_and_unequal_flags_end_both(play, tiny_base, photos, tmp_path):
    file, own_file = tmp_path / "config.json", tmp_path / "own.json"
    one_word = [
        str(photos),
        "dog",
        "--pretrained_model_name_or_path",
        str(tiny_base),
        "--resolution",
        "64",
    ]
    one_word += ["--max_train_steps", "2", "--num_validation_images", "0", "--report_to", "none"]
    one_word += ["--output_dir", str(tmp_path / "word")]
    planned = tiny_config(tiny_base, photos, tmp_path / "plan", max_train_steps=2, memory="auto")
    file.write_text(json.dumps(planned.to_dict()))
    own_file.write_text(json.dumps(tiny_config(tiny_base, photos, tmp_path / "run").to_dict()))
    own_flags = ["--config", str(own_file)]
    pairs = [
        [[*own_flags, "--rank", "2"], [*own_flags, "--rank", "4"]],
        [own_flags, [*own_flags, "--rank", "many"]],
        [[*own_flags, "--memory", "auto"], own_flags],
        [[str(photos), "dog"], [str(photos), "cat"]],
    ]
    free_and_flags = [([23.2, 20.8], [one_word] * 2)]
    free_and_flags += [([23.2, 0.01], [["--config", str(file)]] * 2)]
    free_and_flags += [([23.2, 3.0], pair) for pair in pairs]
    ended, processes = play([{"free": free, "flags": flags} for free, flags in free_and_flags])
    outputs = [output for _, output in ended]
    for main, second in zip(*(played[:2] for played in processes), strict=True):
        assert (
            main["adapter"] == second["adapter"]
            and main["code"] == second["code"] == 0
            and main["adapter"]
        ), outputs
    word, plan = (
        json.loads((tmp_path / name / "train_config.json").read_text()) for name in ("word", "plan")
    )
    assert word["rank"] == 16 and plan["gradient_checkpointing"] is True
    assert "recipe: assets/configs/sdxl.toml (" in outputs[0]
    assert all(
        (end["code"], end["adapter"]) == (2, None) for played in processes for end in played[2:]
    ), outputs
    main, second = (
        [line for line in output.splitlines() if line.startswith("error: ")] for output in outputs
    )
    assert len(main) == len(second) == len(pairs), outputs
    same = "give all processes the same flags and files."
    assert (
        main[0]
        == second[0]
        == f"error: process 1 has --rank 4, and the main process --rank 2: {same}"
    )
    assert (
        main[1] == f"error: process 1 ended: {second[1].removeprefix('error: ')}"
        and "many" in second[1]
    )
    assert (
        main[2]
        == f"error: process 1 has --memory None, and the main process --memory 'auto': {same}"
    )
    assert main[3] == f"error: process 1 has cat, and the main process dog: {same}"
    assert not any("Traceback" in output for output in outputs)
