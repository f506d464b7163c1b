"""Pictures in two denoising steps, for tests of when and from what they are drawn. Of SDXL's pipeline in diffusers."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from diffusers import StableDiffusionXLPipeline


@contextmanager
def few_steps(count: int = 2) -> Iterator[None]:
    """So many steps, whatever the program asks for, while it is open: it asks for 25, and for 50 for class images."""
    drawn = StableDiffusionXLPipeline.__call__

    def draw(self: StableDiffusionXLPipeline, *args: object, **options: object) -> object:
        return drawn(self, *args, **{**options, "num_inference_steps": count})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusionXLPipeline, "__call__", draw)
        yield
