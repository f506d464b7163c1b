"""Encodes a crop of a photo as latents, time ids and mask; the VAE encodes each crop once."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from dreambooth_moslora.base import load
from dreambooth_moslora.core.digests import content_key, file_digest
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.photos.crops import CropPlan, CropRule, apply_crop
from dreambooth_moslora.photos.masks import open_mask
from dreambooth_moslora.photos.photo import Photo, open_rgb
from dreambooth_moslora.training.inputs.encoding_cache import TensorCache, Tensors, fingerprint

__all__ = ["EncodedView", "PhotoEncoder"]

Crop = tuple[Image.Image, Image.Image | None]
"""A crop and its mask."""


@dataclass(frozen=True)
class EncodedView:
    """One crop of one photo: `latents` (4, h, w), `time_ids` (6,), and `mask` (1, h, w), the loss weights, or None."""

    latents: Tensor
    time_ids: Tensor
    mask: Tensor | None


class PhotoEncoder:
    """Crops and encodes photos. The VAE computes only what the cache does not hold."""

    def __init__(
        self,
        vae: AutoencoderKL,
        cache: TensorCache | None,
        rule: CropRule,
        readers: int = 0,
        unmasked_weight: float = 0.0,
    ):
        """Without a cache, `readers` threads open and crop photos ahead of time."""
        self.vae, self.cache, self.rule, self.unmasked_weight = vae, cache, rule, unmasked_weight
        self.vae_identity = fingerprint(vae)
        self._digests: dict[object, str] = {}
        self._readers = ThreadPoolExecutor(readers) if readers and cache is None else None
        self._reading: dict[tuple[Photo, CropPlan], Future[Crop]] = {}

    def encode(self, photo: Photo, plan: CropPlan) -> EncodedView:
        tensors = self._compute(photo, plan) if self.cache is None else self.cache.get(*self.entry(photo, plan))
        weights = self._weights(photo, tensors["subject"]) if "subject" in tensors else None
        return EncodedView(tensors["latents"], torch.tensor(plan.time_ids, dtype=torch.float32), weights)

    def entry(self, photo: Photo, plan: CropPlan) -> tuple[str, Callable[[], Tensors]]:
        """The crop's key in the cache, and the function that encodes it."""
        return self._key(photo, plan), lambda: self._compute_unchanged(photo, plan)

    def _weights(self, photo: Photo, subject: Tensor) -> Tensor:
        """Loss weights, `subject` (1, h, w) in [0, 1] -> same shape: 1 on the subject and `unmasked_weight` around it.

        Around a photo with transparency the weight is 0: its white background was not photographed.
        """
        around = 0.0 if photo.mask_path == photo.path else self.unmasked_weight
        return around + (1 - around) * subject

    def _key(self, photo: Photo, plan: CropPlan) -> str:
        return content_key(
            photo=self._digest(photo.path),
            subject=photo.mask_path and self._digest(photo.mask_path),
            plan=plan,
            interpolation=self.rule.interpolation,
            vae=self.vae_identity,
        )

    def _digest(self, path) -> str:
        if path not in self._digests:
            self._digests[path] = file_digest(path)
        return self._digests[path]

    def _compute_unchanged(self, photo: Photo, plan: CropPlan) -> Tensors:
        """Compute the tensors. Raises UserError if the photo has changed since its key was made, as its
        encoding would be kept under a wrong key; and if the VAE has left memory and the disk cache cannot be
        read."""
        if self.vae is None:
            raise UserError(
                f"{self.cache.folder}: the encoding of {photo.path} cannot be read any more, and the VAE has left "
                "memory; resume the run, which encodes it anew."
            )
        tensors = self._compute(photo, plan)
        for path in filter(None, (photo.path, photo.mask_path)):
            if file_digest(path) != self._digest(path):
                raise UserError(f"{path} was changed while it was read; start again.")
        return tensors

    def read_ahead(self, photo: Photo, plan: CropPlan) -> None:
        if self._readers is not None and (photo, plan) not in self._reading:
            self._reading[photo, plan] = self._readers.submit(load_crop, photo, plan, self.rule.interpolation)

    def _compute(self, photo: Photo, plan: CropPlan) -> Tensors:
        reading = self._reading.pop((photo, plan), None)
        image, mask = reading.result() if reading else load_crop(photo, plan, self.rule.interpolation)
        latents = load.encode_image(self.vae, pixels_of(image)[None])[0].cpu()
        return {"latents": latents} if mask is None else {"latents": latents, "subject": latent_mask(mask, latents)}


def load_crop(photo: Photo, plan: CropPlan, interpolation: str) -> Crop:
    """The photo's crop and its mask's, of the target size."""
    image, mask = apply_crop(open_rgb(photo), plan, interpolation), open_mask(photo)
    return image, None if mask is None else apply_crop(mask, plan, "bilinear")


def pixels_of(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def latent_mask(mask: Image.Image, latents: Tensor) -> Tensor:
    """Grey picture, latents (4, h, w) -> (1, h, w) in [0, 1], averaged to the latents' size."""
    grey = torch.from_numpy(np.array(mask, dtype=np.float32))[None, None] / 255
    return F.adaptive_avg_pool2d(grey, latents.shape[-2:])[0]
