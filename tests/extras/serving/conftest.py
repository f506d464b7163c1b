"""A base and a shelf of adapters, as the service draws with them."""

from pathlib import Path

import pytest

from dreambooth_moslora.generation.pipeline import SubjectPipeline
from tests.helpers.tiny_adapters import save_diffusers_lora

TOKEN = "correct-horse-battery"
NAMES = ("dog", "cat", "emu")


@pytest.fixture(scope="module")
def base(tiny_base) -> SubjectPipeline:
    return SubjectPipeline.from_base(tiny_base)


@pytest.fixture(scope="module")
def shelf(base, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("made")
    (made / "shelf").mkdir()
    for seed, name in enumerate(NAMES):
        save_diffusers_lora(base.pipeline.unet, made / name, seed=seed).rename(made / "shelf" / f"{name}.safetensors")
    return made / "shelf"
