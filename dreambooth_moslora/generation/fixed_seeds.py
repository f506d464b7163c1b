"""Pictures that a run draws at fixed seeds: training's samples, evaluation's pictures, class images.

The same prompt and seed give the same noise at every step, so that only the adapter differs. Prompts are
encoded once; the text encoders may be freed before the first picture is drawn.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from dreambooth_moslora.base.decode import decode_image, decode_pixels, pictures_of
from dreambooth_moslora.base.load import TextCond, default_guidance, guidance_rescale
from dreambooth_moslora.core import StopRequestedError, UserError

DEFAULT_INFERENCE_STEPS = 25


@dataclass(frozen=True)
class SampleRequest:
    """One picture: its prompt, and the seed of its noise."""

    prompt: str
    seed: int


@dataclass
class Sampler:
    """Draws requests with the pipeline's current UNet. `embed` returns the TextCond of prompts, cached or computed.
    `guidance_scale` None is the base's own. `on_step` is called after each denoising step. Raises StopRequestedError at
    the next denoising step after `should_stop` returns true."""

    pipeline: StableDiffusionXLPipeline
    embed: Callable[[list[str]], TextCond]
    resolution_px: int
    device: torch.device
    inference_steps: int = DEFAULT_INFERENCE_STEPS
    should_stop: Callable[[], bool] = bool
    guidance_scale: float | None = None
    on_step: Callable[[], object] = bool

    def __call__(self, requests: Sequence[SampleRequest], batch_size: int = 1) -> Generator[Image.Image, None, None]:
        """The pictures, in order. Each has its own noise in any batch. Without requests, no VAE is needed."""
        if not requests:
            return
        pipeline = self.pipeline
        parts = [p for p in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2) if p is not None]
        modes, home = [part.training for part in parts], pipeline.vae.device
        for part in parts:
            part.eval()  # adapters may have dropout
        pipeline.vae.to(self.device)
        try:
            for start in range(0, len(requests), batch_size):
                yield from self._draw(requests[start : start + batch_size])
        finally:
            for part, mode in zip(parts, modes):
                part.train(mode)
            pipeline.vae.to(home)

    @torch.no_grad()
    def _draw(self, requests: Sequence[SampleRequest]) -> list[Image.Image]:
        cond, empty = self.embed([r.prompt for r in requests]), None
        if not self.pipeline.config.force_zeros_for_empty_prompt:  # else the pipeline itself makes zeros
            empty = self.embed([""] * len(requests))
        to = {"device": self.device, "dtype": self.pipeline.unet.dtype}
        latents = self.pipeline(
            prompt_embeds=cond.embeds.to(**to),
            pooled_prompt_embeds=cond.pooled.to(**to),
            negative_prompt_embeds=empty and empty.embeds.to(**to),
            negative_pooled_prompt_embeds=empty and empty.pooled.to(**to),
            generator=[torch.Generator().manual_seed(r.seed) for r in requests],
            num_inference_steps=self.inference_steps,
            guidance_scale=default_guidance(self.pipeline) if self.guidance_scale is None else self.guidance_scale,
            guidance_rescale=guidance_rescale(self.pipeline),
            height=self.resolution_px,
            width=self.resolution_px,
            output_type="latent",
            callback_on_step_end=stopper(self.should_stop, self.on_step),
        ).images
        return decode_image(self.pipeline.vae, latents)


def stopper(should_stop: Callable[[], bool], on_step: Callable[[], object] = bool) -> Callable[..., dict]:
    """A callback for the pipeline, for after each denoising step."""

    def ask(_pipeline: object, _step: int, _timestep: object, tensors: dict) -> dict:
        on_step()
        if should_stop():
            raise StopRequestedError
        return tensors

    return ask


def generate_images(
    pipeline: StableDiffusionXLPipeline,
    prompt: str,
    seeds: list[int],
    size_px: tuple[int, int],
    should_stop: Callable[[], bool] = bool,
) -> list[Image.Image]:
    """Images (h, w) = `size_px` of one prompt by the base alone, at its own guidance and the pipeline's defaults: class
    images and scenes. Raises UserError for pictures that are not finite: they would be trained on as black images."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"height": size_px[0], "width": size_px[1], "guidance_scale": default_guidance(pipeline)}
    options["guidance_rescale"] = guidance_rescale(pipeline)
    options["callback_on_step_end"] = stopper(should_stop)
    latents = pipeline([prompt] * len(seeds), generator=generators, output_type="latent", **options).images
    pixels = decode_pixels(pipeline.vae, latents)
    if not pixels.isfinite().all():
        remedy = "give --prior_generation_precision fp32, or another base if it says so in fp32 too."
        raise UserError(f"the base draws pictures that are not finite (NaN): {remedy}")
    return pictures_of(pixels)
