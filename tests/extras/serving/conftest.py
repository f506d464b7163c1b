"""A base and a shelf of adapters, as the service draws with them."""

from pathlib import Path

import pytest

from dreambooth_moslora.extras.serving.catalogue import open_catalogue
from dreambooth_moslora.extras.serving.drawer import ImageWorker
from dreambooth_moslora.extras.serving.front import Access, Front
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from tests.helpers.tiny_adapters import save_diffusers_lora

TOKEN = "correct-horse-battery"
NAMES = ("dog", "cat", "emu")


def shop_of(pipeline: SubjectPipeline, folder: Path, **options) -> tuple[Front, ImageWorker]:
    """The service in this process, without Ray."""
    drawer = ImageWorker(pipeline, batch=2)
    catalogue = open_catalogue([str(folder)])

    async def facts() -> dict:
        return {"base": pipeline.base_name, "resolution_px": pipeline.resolution_px}

    settings = {"access": Access(()), "max_inside": 16, "request_timeout_sec": 60.0} | options
    return Front(drawer.draw, facts, catalogue, **settings), drawer


@pytest.fixture(scope="module")
def base(tiny_base) -> SubjectPipeline:
    return SubjectPipeline.from_base(tiny_base)


@pytest.fixture(scope="module")
def shelf(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "shelf").mkdir()
    for seed, name in enumerate(NAMES):
        save_diffusers_lora(base.pipeline.unet, folder / name, seed=seed).rename(
            folder / "shelf" / f"{name}.safetensors"
        )
    return folder / "shelf"
