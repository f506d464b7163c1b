"""`accelerate launch` with two processes, against one process that accumulates two micro-batches.

On CPUs accelerate starts several processes by `--multi_gpu` with ACCELERATE_USE_CPU=true; by `--cpu` it starts one,
unless there are MPI and a host file. Both are tried here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.training.loop import train
from tests.helpers.ranks import ended_ranks
from tests.helpers.tiny_training import adapter_sha256, largest_difference, paint_photos, tiny_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
SCRIPT = ROOT / "tests" / "helpers" / "two_processes.py"


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in RunDir(folder).read_metrics() if event["type"] == "step"]


def launch(config, tmp_path: Path, *flags: str, script: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    return subprocess.run(
        [*LAUNCH, *flags, str(script), "--config", str(tmp_path / "config.json")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_two_processes_train_one_adapter_and_are_one_process_with_accumulation_two(tiny_base, tmp_path):
    photos = paint_photos(tmp_path / "photos")
    changes = {"max_train_steps": 4, "with_prior_preservation": True, "prior": "adapter_off"}
    changes |= {"lr_scheduler": "linear", "lr_warmup_steps": 2}
    changes |= {"train_text_encoder_ti": True, "caption_dropout": 0.5}  # a process may have no prompt with the word
    both = tiny_config(tiny_base, photos, tmp_path / "both", **changes)
    done = launch(both, tmp_path, "--multi_gpu", script=SCRIPT, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads((tmp_path / "both" / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1] and ranks[0]["processes"] == 2
    train(tiny_config(tiny_base, photos, tmp_path / "one", gradient_accumulation_steps=2, **changes))
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def shown(folder: Path, ranks: int) -> list:
    """The micro-batches of all processes in the order of their numbers: (number, prompts, hash of the latents)."""
    found = [note for rank in range(ranks) for note in json.loads((folder / f"shown_{rank}.json").read_text())]
    return sorted(found, key=lambda micro_batch: micro_batch[0])


def test_several_subjects_are_shown_and_learnt_alike_by_two_processes_and_by_one(tiny_base, tmp_path):
    words = (("sks", "dog", 3), ("zwx", "cat", 1), ("ohwx", "bear", 2))
    tables = [
        {
            "instance_data_dir": str(paint_photos(tmp_path / kind, count)),
            "instance_prompt": f"a photo of {token} {kind}",
            "class_prompt": f"a photo of a {kind}",
        }
        for token, kind, count in words
    ]
    changes = {
        "subjects": tables,
        "with_prior_preservation": True,
        "prior": "adapter_off",
        "train_batch_size": 2,
        "max_train_steps": 4,
    }
    changes |= {"train_text_encoder_ti": True}  # a process may have no prompt with a subject's word
    both = tiny_config(tiny_base, None, tmp_path / "both", **changes)
    done = launch(both, tmp_path, "--multi_gpu", script=SCRIPT, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stdout + done.stderr
    one = tiny_config(tiny_base, None, tmp_path / "one", gradient_accumulation_steps=2, **changes)
    (tmp_path / "one.json").write_text(json.dumps(one.to_dict()))
    subprocess.run([sys.executable, str(SCRIPT), "--config", str(tmp_path / "one.json")], check=True)
    assert shown(tmp_path / "both", 2) == shown(tmp_path / "one", 1)
    prompts = [prompt for _, found, _ in shown(tmp_path / "both", 2) for prompt in found[:2]]
    assert len(prompts) == 16 and all(len(set(prompts[at : at + 3])) == 3 for at in range(0, 15, 3))
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert largest_difference(tmp_path / "both", tmp_path / "one") < 1e-5


def test_launched_on_cpus_without_mpi_it_is_one_process_and_says_so(tiny_base, tmp_path):
    photos = paint_photos(tmp_path / "photos")
    config = tiny_config(tiny_base, photos, tmp_path / "launched", max_train_steps=1)
    done = launch(config, tmp_path, "--cpu", script=ROOT / "train_dreambooth.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes" in done.stderr
    train(tiny_config(tiny_base, photos, tmp_path / "plain", max_train_steps=1))
    assert adapter_sha256(tmp_path / "launched") == adapter_sha256(tmp_path / "plain")


def test_a_stop_that_one_process_hears_while_photos_are_encoded_ends_all(tiny_base, tmp_path, free_port):
    config = tiny_config(tiny_base, paint_photos(tmp_path / "photos"), tmp_path / "run")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    ended = ended_ranks("tests.helpers.stopped_process", free_port, "--config", str(tmp_path / "config.json"))
    said = [words for _, words in ended]
    assert [code for code, _ in ended] == [130, 130], said
    assert "stopped before the first step" in said[0]
    assert ["said by every process" in words for words in said] == [True, False]
    assert not RunDir(tmp_path / "run").checkpoints()
