"""A preview costs the GPU nothing until somebody looks at it."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from dreambooth_moslora.generation.params import GenerationParams
from dreambooth_moslora.generation.progress import Clock, LatentColours, Preview, Watcher
from tests.helpers.tiny import tiny_sdxl

PARAMS = GenerationParams("a dog", steps=3, height_px=1024, width_px=512)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return LatentColours(tiny_sdxl(tmp_path_factory.mktemp("base")).vae)


def after_a_step(latents: torch.Tensor, colours: LatentColours) -> Preview:
    """What the watcher emits beside the step."""
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    events: list = []
    watcher = Watcher(0, PARAMS, Clock(PARAMS), colours, events.append, bool)
    for step in range(2):
        watcher(SimpleNamespace(scheduler=scheduler), step, None, {"latents": latents})
    return events[-1]


def test_the_callback_brings_nothing_to_the_cpu(colours):
    """Numbers on the meta device cannot be read: whoever copies them fails."""
    preview = after_a_step(torch.empty(1, 4, 128, 64, device="meta"), colours)
    assert isinstance(preview, Preview)
    with pytest.raises(NotImplementedError, match="meta"):
        preview.pixels  # noqa: B018


def test_a_preview_is_as_large_as_the_page_shows_it_and_no_larger_than_the_picture(colours):
    preview = after_a_step(torch.randn(1, 4, 128, 64), colours)
    assert preview.pixels.size == (192, 384) and preview.pixels is preview.pixels
    small = Preview(0, torch.randn(1, 4, 8, 8), (64, 64), colours)
    assert small.pixels.size == (64, 64)
