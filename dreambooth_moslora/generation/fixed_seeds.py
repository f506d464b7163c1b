"""Pictures that a run draws at fixed seeds: training's samples, evaluation's pictures, class
images.

The same prompt and seed give the same noise at every step, so that only the adapter differs.
Prompts are encoded once; the text encoders may be freed before the first picture is drawn.
"""

import logging
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from dreambooth_moslora.base import decode, load, machine, pipelines
from dreambooth_moslora.errors import StopRequestedError, UserError, is_out_of_memory
from dreambooth_moslora.settings.families import facts_of

logger = logging.getLogger(__name__)

DEFAULT_INFERENCE_STEPS = 25


@dataclass(frozen=True)
class SampleRequest:
    prompt: str
    seed: int


@dataclass
class Sampler:
    pipeline: DiffusionPipeline
    embed: Callable[[list[str]], list[pipelines.Text]]  # the texts of prompts, cached or computed
    resolution_px: int
    device: torch.device
    inference_steps: int = DEFAULT_INFERENCE_STEPS
    should_stop: Callable[[], bool] = bool  # raises StopRequestedError at the next denoising step
    guidance_scale: float | None = None  # None is the base's own
    on_step: Callable[[], object] = bool  # after each denoising step

    def __call__(
        self, requests: Sequence[SampleRequest], batch_size: int = 1
    ) -> Generator[Image.Image, None, None]:
        """The pictures, in order. Each has its own noise in any batch. Without requests, no VAE is
        needed."""
        if not requests:
            return
        pipeline = self.pipeline
        facts = facts_of(type(pipeline).__name__)
        names = (facts.denoiser, *facts.encoders)
        parts = [part for part in (getattr(pipeline, name) for name in names) if part is not None]
        modes, home = [part.training for part in parts], pipeline.vae.device
        for part in parts:
            part.eval()  # adapters may have dropout
        pipeline.vae.to(self.device)
        try:
            waiting = list(requests)
            while waiting:
                try:
                    pictures = self._draw(waiting[:batch_size])
                except Exception as error:
                    if batch_size == 1 or not is_out_of_memory(error):
                        raise
                    pictures = []

                if not pictures:  # out of the block, where the error holds no tensors any more
                    machine.free_unused_blocks(self.device)
                    batch_size = math.ceil(min(batch_size, len(waiting)) / 2)
                    logger.warning("pictures ran out of memory: %d are drawn at once.", batch_size)
                yield from pictures
                del waiting[: len(pictures)]
        finally:
            for part, mode in zip(parts, modes):
                part.train(mode)
            pipeline.vae.to(home)

    @torch.no_grad()
    def _draw(self, requests: Sequence[SampleRequest]) -> list[Image.Image]:
        family = pipelines.family_of(self.pipeline)
        to = {"device": self.device, "dtype": pipelines.denoiser_of(self.pipeline).dtype}
        words, empty = (
            family.arguments([pipelines.in_dtype(text, **to) for text in self.embed(prompts)])
            for prompts in ([r.prompt for r in requests], [""] * len(requests))
        )
        seeds, size = [r.seed for r in requests], (self.resolution_px, self.resolution_px)
        stop = stopper(self.should_stop, self.on_step)
        options = {"num_inference_steps": self.inference_steps, "callback_on_step_end": stop}
        words = family.with_negative(words, empty)
        pixels = drawn(self.pipeline, words, seeds, size, self.guidance_scale, **options)
        return decode.pictures_of(decode.finite_or_black(pixels))


def drawn(
    pipeline: DiffusionPipeline,
    words: dict[str, Any],
    seeds: list[int],
    size_px: tuple[int, int],
    guidance: float | None = None,
    **options: Any,
) -> torch.Tensor:
    """Pixels (B, 3, h, w), about in [-1, 1], by the pipeline's call with `words`. `guidance` None
    is the base's own."""
    facts = facts_of(type(pipeline).__name__)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options |= {"height": size_px[0], "width": size_px[1], "generator": generators}
    options[facts.guidance_name] = load.default_guidance(pipeline) if guidance is None else guidance
    if facts.style == "flow":
        return pipeline(**words, **options, output_type="pt").images.float() * 2 - 1
    options["guidance_rescale"] = load.guidance_rescale(pipeline)
    return decode.decode_pixels(
        pipeline.vae, pipeline(**words, **options, output_type="latent").images
    )


def stopper(
    should_stop: Callable[[], bool], on_step: Callable[[], object] = bool
) -> Callable[..., dict]:
    """A callback for the pipeline, for after each denoising step."""

    def ask(_pipeline: object, _step: int, _timestep: object, tensors: dict) -> dict:
        on_step()
        if should_stop():
            raise StopRequestedError
        return tensors

    return ask


@torch.no_grad()
def generate_images(
    pipeline: DiffusionPipeline,
    prompt: str,
    seeds: list[int],
    size_px: tuple[int, int],
    should_stop: Callable[[], bool] = bool,
    text_options: dict[str, Any] | None = None,
) -> list[Image.Image]:
    """Class images (h, w) = `size_px` by the base alone; `text_options` are those of
    `encode_prompt`. Raises UserError for NaN, which would be trained on."""
    words: dict[str, Any] = {"prompt": [prompt] * len(seeds)}
    # a pipeline given a prompt alone may draw without guidance
    if facts_of(type(pipeline).__name__).style == "flow":
        family = pipelines.family_of(pipeline, options=text_options)
        texts = *family.texts(pipeline, [prompt]), family.negative(pipeline, "")
        words = family.with_negative(*(family.arguments([text] * len(seeds)) for text in texts))
    pixels = drawn(pipeline, words, seeds, size_px, callback_on_step_end=stopper(should_stop))
    if not pixels.isfinite().all():
        remedy = (
            "give --prior_generation_precision fp32, or another base if it says so in fp32 too."
        )
        raise UserError(f"the base draws pictures that are not finite (NaN): {remedy}")
    return decode.pictures_of(pixels)
