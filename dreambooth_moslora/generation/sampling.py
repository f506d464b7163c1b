"""How a pipeline draws: `draw_pixels`, by which every picture of the program is drawn.

    SubjectPipeline     pictures that a person asks for, by the command, the page or the service
    Sampler             training's samples, evaluation's pictures
    generate_images     class images

The same prompt and seed give the same noise at every step of a training, so that only the adapter
differs. A Sampler's prompts are encoded once; the text encoders may be freed before the first
picture is drawn.
"""

import logging
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from dreambooth_moslora.base import decode, devices, families, load
from dreambooth_moslora.errors import StopRequestedError, UserError, is_out_of_memory
from dreambooth_moslora.precision import FP16_OVERFLOW_ADVICE
from dreambooth_moslora.settings.family_facts import get_facts

logger = logging.getLogger(__name__)

Request = TypeVar("Request")

# Denoising steps of a picture
DEFAULT_INFERENCE_STEPS = 25


@dataclass(frozen=True)
class SampleRequest:
    """A picture to draw."""

    prompt: str
    seed: int


@dataclass
class Sampler:
    """Draws pictures by a pipeline with its adapters, as they are at the moment."""

    pipeline: DiffusionPipeline
    embed: Callable[
        [list[str]], list[families.TextEmbedding]
    ]  # the texts of prompts, cached or computed
    resolution_px: int
    device: torch.device
    inference_steps: int = DEFAULT_INFERENCE_STEPS
    should_stop: Callable[[], bool] = bool  # raises StopRequestedError at the next denoising step
    guidance_scale: float | None = None  # None is the base's own
    on_step: Callable[[], object] = bool  # after each denoising step
    references: Sequence[Image.Image] = ()  # shown beside each prompt

    def __call__(
        self, requests: Sequence[SampleRequest], batch_size: int = 1
    ) -> Generator[Image.Image, None, None]:
        """The pictures, in order. Each has its own noise in any batch. Without requests, no VAE is
        needed."""
        if not requests:
            return
        pipeline = self.pipeline
        facts = get_facts(type(pipeline).__name__)
        parts = [getattr(pipeline, name) for name in (facts.denoiser, *facts.encoders)]
        parts = [part for part in parts if part is not None]

        # To drawing: adapters may have dropout, and training keeps the VAE off the GPU.
        modes = [part.training for part in parts]
        home = pipeline.vae.device
        for part in parts:
            part.eval()
        pipeline.vae.to(self.device)
        try:
            yield from in_batches(requests, batch_size, self._draw, self.device)

        # Back to training, also after an error or a stop
        finally:
            for part, mode in zip(parts, modes):
                part.train(mode)
            pipeline.vae.to(home)

    @torch.no_grad()
    def _draw(self, requests: Sequence[SampleRequest]) -> list[Image.Image]:
        """One batch of pictures. Raises StopRequestedError."""
        family = families.build_family(self.pipeline)
        prompts = [request.prompt for request in requests]
        empty = self._words([""] * len(requests))
        words = family.add_negative(self._words(prompts), empty)
        if self.references:
            words = family.add_references(words, prompts, self.references, self.resolution_px)
        pixels = draw_pixels(
            self.pipeline,
            words,
            seeds=[request.seed for request in requests],
            size_px=(self.resolution_px, self.resolution_px),
            guidance=self.guidance_scale,
            num_inference_steps=self.inference_steps,
            callback_on_step_end=stopper(self.should_stop, self.on_step),
        )
        return decode.to_images(decode.warn_nonfinite_pixels(pixels))

    def _words(self, prompts: list[str]) -> dict[str, Any]:
        """The prompts' texts as arguments of the pipeline, where and as the denoiser computes."""
        dtype = families.get_denoiser(self.pipeline).dtype
        texts = [
            families.cast_embedding(text, device=self.device, dtype=dtype)
            for text in self.embed(prompts)
        ]
        return families.build_family(self.pipeline).collate(texts)


def in_batches(
    requests: Sequence[Request],
    batch_size: int,
    draw: Callable[[Sequence[Request]], list[Image.Image]],
    device: torch.device,
    on_smaller: Callable[[int], object] = bool,
) -> Generator[Image.Image, None, None]:
    """The pictures that `draw` makes of the requests, in order. Batches become smaller when the
    device runs out of memory, of which `on_smaller` hears."""
    waiting = list(requests)
    while waiting:
        try:
            pictures = draw(waiting[:batch_size])
        except Exception as error:
            if batch_size == 1 or not is_out_of_memory(error):
                raise
            pictures = []

        # Out of the block, where the error holds no tensors any more
        if not pictures:
            devices.free_unused_blocks(device)
            batch_size = math.ceil(min(batch_size, len(waiting)) / 2)
            on_smaller(batch_size)
            logger.warning("pictures ran out of memory: %d are drawn at once.", batch_size)
        yield from pictures
        del waiting[: len(pictures)]


def draw_pixels(
    pipeline: DiffusionPipeline,
    conditioning: dict[str, Any],
    seeds: Sequence[int],
    size_px: tuple[int, int],
    guidance: float | None = None,
    **options: Any,
) -> torch.Tensor:
    """Return one batch of pictures as pixels (B, 3, h, w), about in [0, 1], in fp32.

    pipeline: of any family
    conditioning: arguments of its call that stand for the prompts
    seeds: (B,) of the noise, one for each picture
    size_px: (h, w)
    guidance: None is the base's own
    options: further arguments of the call
    """
    facts = get_facts(type(pipeline).__name__)
    options["height"], options["width"] = size_px
    if guidance is None:
        guidance = load.get_default_guidance(pipeline)
    options[facts.guidance_name] = guidance
    conditioning = families.drop_unused_negative(facts, conditioning, guidance)

    # On the CPU: a seed means the same noise on every device and in any batch.
    options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]

    # A flow's pipeline unpacks its latents and decodes them itself. A fourth channel is opacity.
    if facts.style == "flow":
        with decode.enable_tiling(
            pipeline.vae,
            size_px=size_px,
            device=devices.get_device(pipeline.vae),
            bytes_per_pixel=facts.decoder_bytes_per_pixel,
        ):
            return pipeline(**conditioning, **options, output_type="pt").images[:, :3].float()

    # Latents of UNets are decoded here, in fp32 where fp16 overflows. Models that take turns on a
    # GPU then leave it.
    options["guidance_rescale"] = load.get_guidance_rescale(pipeline)
    latents = pipeline(**conditioning, **options, output_type="latent").images
    pixels = decode.decode_pixels(pipeline.vae, latents)
    pipeline.maybe_free_model_hooks()
    return pixels


def stopper(
    should_stop: Callable[[], bool], on_step: Callable[[], object] = bool
) -> Callable[..., dict]:
    """The pipeline's callback after each denoising step. It raises StopRequestedError on
    request."""

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
    seeds: Sequence[int],
    size_px: tuple[int, int],
    should_stop: Callable[[], bool] = bool,
    text_options: dict[str, Any] | None = None,
) -> list[Image.Image]:
    """Class images by the base alone.

    pipeline: the base
    prompt: of the class
    seeds: of the noise, one for each picture
    size_px: (h, w)
    should_stop: asked after each denoising step; raises StopRequestedError then
    text_options: those of `encode_prompt`

    Raises UserError for NaN, which would be trained on.
    """
    words: dict[str, Any] = {"prompt": [prompt] * len(seeds)}

    # A flow's pipeline given a prompt alone may draw without guidance, and no pipeline knows all
    # options.
    if get_facts(type(pipeline).__name__).style == "flow" or text_options:
        family = families.build_family(pipeline, options=text_options)
        (text,) = family.encode_prompts(pipeline, [prompt])
        negative = family.encode_negative(pipeline, "")
        words = family.add_negative(
            family.collate([text] * len(seeds)),
            family.collate([negative] * len(seeds)),
        )

    pixels = draw_pixels(pipeline, words, seeds, size_px, callback_on_step_end=stopper(should_stop))
    if not pixels.isfinite().all():
        raise UserError(
            f"the base draws pictures that are not finite (NaN): give {FP16_OVERFLOW_ADVICE}."
        )
    return decode.to_images(pixels)
