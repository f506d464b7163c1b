"""Previews of a base whose VAE overflows in fp16, as SDXL's own does: they never cost the picture."""

import numpy as np
import pytest
import torch

from dreambooth_moslora.generation.params import GenerationParams, Image
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.generation.progress import Preview
from tests.helpers.tiny import tiny_sdxl

PARAMS = GenerationParams("a photo of a sks dog", seed=3, steps=2, guidance_scale=4.0)
OVERFLOWING = 3e5
"""On the VAE's first weights: its activations leave fp16's range, and its norms take the factor out again."""


def pipeline_of(folder, dtype: torch.dtype, factor: float):
    pipeline = tiny_sdxl(folder)
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight.mul_(factor)
    return pipeline.to(dtype)


def drawn(pipeline) -> tuple[np.ndarray, np.ndarray]:
    """The last preview and the picture."""
    events = list(SubjectPipeline(pipeline, "tiny").generate(PARAMS))
    preview = [event for event in events if isinstance(event, Preview)][-1]
    assert isinstance(events[-1], Image)
    return np.asarray(preview.pixels).astype(int), np.asarray(events[-1].pixels).astype(int)


def test_a_vae_that_overflows_in_fp16_draws_what_it_draws_in_fp32(tmp_path):
    half = pipeline_of(tmp_path / "half", torch.float16, OVERFLOWING)
    found = drawn(half)
    expected = drawn(pipeline_of(tmp_path / "full", torch.float32, OVERFLOWING))
    assert half.vae.dtype == torch.float16
    for mine, wanted in zip(found, expected, strict=True):
        assert wanted.std() > 1 and np.abs(mine - wanted).max() <= 8


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_without_finite_colours_the_preview_is_grey_and_the_picture_comes(factor, tmp_path):
    preview, _ = drawn(pipeline_of(tmp_path, torch.float32, factor))
    assert (preview == 127).all()


def test_a_vae_that_cannot_decode_now_leaves_the_preview_grey(tmp_path, monkeypatch):
    """Memory may be short at that moment. The VAE keeps its precision."""
    pipeline = pipeline_of(tmp_path, torch.float16, 1.0)
    decode, calls = pipeline.vae.decode, []

    def fails_once(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(*arguments, **options)

    monkeypatch.setattr(pipeline.vae, "decode", fails_once)
    preview, picture = drawn(pipeline)
    assert (preview == 127).all() and picture.std() > 0 and pipeline.vae.dtype == torch.float16
