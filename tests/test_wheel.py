"""Wheel in a fresh environment: the quick start's first steps, and the page, in an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from dreambooth_moslora.evaluation import metrics
from dreambooth_moslora.training.loop import train
from tests.helpers.command_line import parse_train_config

ROOT = Path(__file__).parents[1]
FOLDERS, FILES = ("dreambooth_moslora", "assets"), ("pyproject.toml", "README.md", "LICENSE")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
    "OMP_NUM_THREADS": "1"
}
FEW_IMAGES = ["--num_prompts=1", "--images_per_prompt=1", "--class_images=2", "--inference_steps=2"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """Return the folder of a fresh environment's programs, with this environment's libraries."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip"]
    build = [
        *pip,
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(build, check=True)
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder / "fresh")], check=True
    )
    python = folder / "fresh" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "--python", str(python), "install", "-q", "--no-deps", str(wheel)], check=True
    )
    (site,) = (folder / "fresh" / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return python.parent


@pytest.fixture(scope="module")
def run(programs, tmp_path_factory):
    """Return a function that runs a program of that environment and returns its output."""
    folder = tmp_path_factory.mktemp("empty")

    def call(*arguments: str) -> str:
        done = subprocess.run(
            [programs / arguments[0], *arguments[1:]],
            cwd=folder,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        # bitsandbytes, without a GPU
        assert done.returncode == 0 and "gemm_4bit" not in done.stderr, done.stderr
        return done.stdout

    return call


def test_the_wheel_installs_the_program_and_nothing_else(run, programs):
    path = run("python", "-c", "import dreambooth_moslora as d; print(d.__file__)")
    assert Path(path.strip()).is_relative_to(programs.parent)
    (site,) = (programs.parent / "lib").glob("python*/site-packages")
    packages = {
        path.name for path in site.iterdir() if path.is_dir() and path.suffix != ".dist-info"
    }
    assert packages == {"dreambooth_moslora"}


def test_help_names_the_command_as_it_was_typed(run):
    assert run("dreambooth-moslora", "--help").startswith("usage: dreambooth-moslora COMMAND")
    assert "usage: dreambooth-moslora train " in run("dreambooth-moslora", "train", "--help")
    module = ["python", "-m", "dreambooth_moslora", "app"]
    assert run(*module, "--help").startswith(f"usage: {' '.join(module)}")


READ_PHOTO = """
from PIL import Image
from dreambooth_moslora.disk.paths import get_assets_folder
from dreambooth_moslora.photos.captions import load_captioner
from dreambooth_moslora.photos.masks import load_segmenter
from dreambooth_moslora.settings.train_config import TrainConfig
folder = get_assets_folder() / "subjects" / "rocket"
config = TrainConfig(instance_data_dir=str(folder), instance_prompt="a photo of a sks rocket")
photo = Image.open(sorted(folder.glob("*.jpg"))[0])
mask = load_segmenter(config).mask(photo)
print(load_captioner(config).surroundings(photo), "|", mask.getextrema())
"""


def test_the_quick_start_runs_from_the_wheel(run):
    """Run all in one process, which imports PyTorch once."""
    commands = [
        [
            "train",
            "--config",
            "assets/configs/quickstart.toml",
            "--max_train_steps=2",
            "--num_validation_images=0",
        ],
        ["info", "runs/rocket"],
        ["evaluate", "runs/rocket", *FEW_IMAGES],
        [
            "generate",
            "--adapter",
            "assets/adapters/rocket.safetensors",
            "--steps=1",
            "--prompt",
            "a sks rocket",
        ],
    ]
    code = (
        "from dreambooth_moslora.cli.main import main\n"
        f"print([main(arguments) for arguments in {commands}])"
    )
    out = run("python", "-c", code + READ_PHOTO)
    assert "dreambooth_moslora 0.1.0" in out and ".png" in out
    assert out.splitlines()[-2:] == ["[0, 0, 0, 0]", "on grass on an overcast day | (0, 255)"]
    scores = json.loads(
        run("python", "-c", "print(open('runs/rocket/evaluation/scores.json').read())")
    )
    assert scores["scores"].keys() >= {"dino", "clip_t"} and not [
        name for name in scores["scores"] if "truth" in name
    ]


def test_the_page_opens(programs, tmp_path, free_port):
    command = [programs / "dreambooth-moslora", "app", "--server_port", str(free_port)]
    page = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT)
    try:
        assert is_answered(f"http://127.0.0.1:{free_port}/", page)
    finally:
        page.terminate()
        page.wait(timeout=60)


def is_answered(url: str, page: subprocess.Popen) -> bool:
    deadline = time.monotonic() + 180
    while page.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(url, timeout=5) as answer:
                return answer.status == 200
        except OSError:
            time.sleep(0.5)
    return False


def embed_samples(pipeline: StableDiffusionXLPipeline, prompt: str, count: int) -> torch.Tensor:
    """Return DINO vectors of `count` images from fixed seeds."""
    seeds = [torch.Generator().manual_seed(seed) for seed in range(count)]
    images = pipeline(
        [prompt] * count, num_inference_steps=8, guidance_scale=2.5, generator=seeds
    ).images
    return metrics.load_encoders("toy").embed_dino_images(images)


def test_the_subject_is_learnt_and_its_class_stays_varied(tmp_path):
    config = parse_train_config(["--config", "assets/configs/quickstart.toml"])
    rocket = ROOT / "assets" / "subjects" / "rocket"
    places = {"instance_data_dir": str(rocket), "output_dir": str(tmp_path / "rocket")}
    run = train(replace(config, max_train_steps=40, num_validation_images=0, **places))
    photos = [Image.open(path).convert("RGB") for path in sorted(rocket.glob("*.jpg"))]
    photo_vectors = metrics.load_encoders("toy").embed_dino_images(photos)
    pipeline = StableDiffusionXLPipeline.from_pretrained(ROOT / "assets" / "toy-sdxl")
    pipeline.set_progress_bar_config(disable=True)
    prompts = {"subject": "a photo of a sks rocket in a forest", "class": "a photo of a rocket"}
    before = {name: embed_samples(pipeline, prompt, 5) for name, prompt in prompts.items()}
    pipeline.load_lora_weights(run.run_dir)
    after = {name: embed_samples(pipeline, prompt, 5) for name, prompt in prompts.items()}
    likeness = [
        float(metrics.subject_fidelity(vectors["subject"], photo_vectors).mean())
        for vectors in (before, after)
    ]
    variety = [metrics.diversity(vectors["class"], 5).item() for vectors in (before, after)]
    assert likeness[1] > likeness[0] + 0.08  # measured: 0.19
    assert variety[1] > 0.75 * variety[0]
