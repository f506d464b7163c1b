"""The commands of the pages that a newcomer follows word by word are run: as dry runs, and on the embedded base."""

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from dreambooth_moslora.base import machine
from dreambooth_moslora.cli.main import main, train_main
from tests.helpers.tiny_training import paint_photos
from tests.test_readme import blocks, command_lines

ROOT = Path(__file__).parents[2]
PAGES = ("comfyui", "from_diffusers", "from_kohya", "from_onetrainer")
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
RUN_ELSEWHERE = ("pip install ", "python -m venv ", "python -m dreambooth_moslora doctor")
"""`tests/test_wheel.py` installs the program in a fresh environment, `tests/cli/test_doctor.py` runs the doctor."""
LINES = list(dict.fromkeys(line for page in PAGES for line in command_lines(ROOT / "docs" / f"{page}.md")))
TRAININGS = [line for line in LINES if " train_dreambooth.py " in line or " train " in line]
PLANNED = [
    pytest.param(line, marks=pytest.mark.slow) if "--resume_from_checkpoint" in line else line for line in TRAININGS
]
"""To look for a checkpoint imports diffusers and PEFT."""
WALK = [line for line in command_lines(ROOT / "docs" / "comfyui.md") if not line.startswith(RUN_ELSEWHERE)]
SHORTER = {
    "train": ["--max_train_steps", "2", "--num_validation_images", "1", "--evaluate_steps", "0", "--no_find_scale"],
    "generate": ["--steps", "1", "--base", "toy"],
    "caption": ["--pretrained_model_name_or_path", "toy"],
}
"""Command -> what is added, so that it ends soon and needs no download."""

FEWER = {'"max_train_steps": 120': '"max_train_steps": 2, "num_validation_images": 0', "seed=7": "seed=7, steps=1"}
"""What the program of the API page says, and what it says in the test."""


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch) -> Path:
    """`photos/dog` in an empty folder, where the command runs; on whatever processor the tests run, it has bf16."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "has_fast_bf16", lambda: True)
    for path in paint_photos(tmp_path / "photos" / "dog", 5).iterdir():
        Image.open(path).resize((256, 256)).save(path)
    return tmp_path / "photos" / "dog"


def run(line: str, *more: str) -> int:
    """The exit code of a command as it is written, with `more` behind it."""
    match shlex.split(line):
        case ["python", "train_dreambooth.py", *words]:
            return train_main([*words, *more])
        case ["python", "-m", "dreambooth_moslora", *words]:
            return main([*words, *more])
    raise LookupError(line)


def test_the_lines_were_found():
    assert len(TRAININGS) >= 7 and len(WALK) >= 8
    assert {line.split()[3] for line in WALK} == {"check", "caption", "train", "generate", "explain"}


@pytest.mark.parametrize("line", PLANNED)
def test_each_training_of_the_pages_is_planned(line, capsys):
    assert run(line, "--dry_run") == 0
    said = capsys.readouterr()
    assert "memory: encoding" in said.out and SDXL in said.out, said.err


def test_what_the_walk_says_is_printed_is_what_is_printed(capsys):
    (line,) = [line for line in WALK if line.endswith("--dry_run")]
    assert run(line) == 0
    said = capsys.readouterr()
    page = (ROOT / "docs" / "comfyui.md").read_text(encoding="utf-8")
    assert all(choice in page for choice in said.err.splitlines() if ": " in choice)
    cost = [row for row in said.out.splitlines() if row.startswith(("  memory: ", "  speed: "))]
    assert len(cost) == 2 and all(row in page for row in cost)


def test_the_photos_are_checked(photos, capsys):
    assert run("python -m dreambooth_moslora check photos/dog") == 0
    assert "5 usable" in capsys.readouterr().out and Path("dog_crops.png").is_file()


@pytest.mark.slow
def test_the_whole_walk_on_the_embedded_base(capsys):
    for line in WALK:
        name = line.split()[3]
        assert run(line.replace(SDXL, "toy"), *SHORTER.get(name, [])) == 0, (line, capsys.readouterr().err)
    for file in ("dog.kohya.safetensors", "pytorch_lora_weights.safetensors", "contact_sheet.png", "README.md"):
        assert (Path("runs/dog") / file).is_file()
    assert json.loads(Path("runs/dog/train_config.json").read_text())["instance_prompt"] == "a photo of a sks dog"
    assert "after 2 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_the_program_of_the_api_page_trains_and_draws_outside_the_clone():
    (program,) = blocks(ROOT / "docs" / "api.md", "python")
    assert all(words in program for words in FEWER)
    for words, fewer in FEWER.items():
        program = program.replace(words, fewer)
    exec(compile(program, "api.md", "exec"), {})
    assert Path("runs/api/pytorch_lora_weights.safetensors").is_file()
    assert [Image.open(f"rocket_{number}.png").size for number in range(2)] == [(128, 128)] * 2
