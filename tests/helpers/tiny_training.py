"""Small real trainings for the tests: painted photos, a configuration for the tiny base, and what a
run left."""

import hashlib
from pathlib import Path

from PIL import Image, ImageDraw
from safetensors.torch import load_file

from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, RunDir
from dreambooth_moslora.disk.safetensors_header import split_content
from dreambooth_moslora.settings.train_config import TrainConfig

OF_A_SUBJECT = ("instance_data_dir", "instance_prompt", "class_prompt")
SIZES = ((96, 64), (64, 80), (72, 72))


def paint_photos(folder: Path, count: int = 3) -> Path:
    """Photos of different shapes (width, height) and colours."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = Image.new("RGB", SIZES[number % 3], (40 * number, 200 - 30 * number, 90))
        ImageDraw.Draw(image).ellipse((10 + number, 12, 50, 55), fill=(250, 60 * number, 20))
        image.save(folder / f"{number}.png")
    return folder


def tiny_config(base: Path, photos: Path, output: Path, **changes) -> TrainConfig:
    """Five quick steps without sample images; `changes` win. Several subjects name their own photos
    and prompts."""
    settings = {
        "pretrained_model_name_or_path": str(base),
        "instance_data_dir": str(photos),
        "output_dir": str(output),
        "instance_prompt": "a photo of sks dog",
        "class_prompt": "a photo of a dog",
        "resolution": 64,
        "target_modules": ("to_q",),
        "train_batch_size": 1,
        "max_train_steps": 5,
        "learning_rate": 1e-2,
        "text_encoder_lr": 1e-2,
        "num_validation_images": 0,
        "num_class_images": 3,
        "report_to": "none",
        "seed": 3,
    }
    if changes.get("subjects"):
        settings = {name: value for name, value in settings.items() if name not in OF_A_SUBJECT}
    return TrainConfig(**{**settings, **changes})


def logged(run_dir: Path, kind: str = "step") -> list[dict]:
    """The events of a kind that a run noted."""
    return [event for event in RunDir(run_dir).read_events() if event["type"] == kind]


def adapter_sha256(run_dir: Path) -> str:
    """Of the tensors' bytes: the file without its header."""
    content = (run_dir / "pytorch_lora_weights.safetensors").read_bytes()
    return hashlib.sha256(split_content(content)[1]).hexdigest()


def largest_difference(first: Path, second: Path) -> float:
    """Of two runs' published adapters, number by number."""
    first, second = load_file(first / PUBLISHED_NAME), load_file(second / PUBLISHED_NAME)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)
