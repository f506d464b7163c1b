"""Photos and captions as the endless, shuffled, seeded stream of batches that training reads.

    sample at position p  ->  (photo, repeat, crop)  ->  EncodedView  ->  TrainBatch

Each epoch shuffles photos × repeats; crop number = epoch mod `crops_per_photo` (a fresh crop each epoch when nothing
is cached). Every image, class images too, carries its own size and crop conditioning.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from dreambooth_moslora.base import load
from dreambooth_moslora.base.load import TextCond
from dreambooth_moslora.core.digests import content_key, file_digest
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.seeding import place_of, rng
from dreambooth_moslora.photos.crops import CropPlan, CropRule, apply_crop, nearest_shape
from dreambooth_moslora.photos.masks import open_mask
from dreambooth_moslora.photos.photo import Photo, open_rgb
from dreambooth_moslora.training.inputs.encoding_cache import TensorCache, Tensors, fingerprint
from dreambooth_moslora.training.planning.step_plan import samples_an_epoch

__all__ = ["EncodedView", "PhotoEncoder", "PhotoStream", "PromptCache", "TrainBatch", "collate", "move_together"]

Crop = tuple[Image.Image, Image.Image | None]
"""A crop and its mask."""
Size = tuple[int, int]
"""(h, w) in px."""
View = tuple[int, int, Size]
"""(slot: photo times repeats, number of its crop, size of the crop)."""


@dataclass(frozen=True)
class EncodedView:
    """One crop of one photo: `latents` (4, h, w), `time_ids` (6,), `mask` (1, h, w) weighs its places, or None."""

    latents: Tensor
    time_ids: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class TrainBatch:
    """`latents` (B, 4, h, w), `time_ids` (B, 6), `mask` (B, 1, h, w) or None, `prompts` (B), all on the CPU.

    The first `instance_count` images are the subject's, the others are prior images.
    """

    latents: Tensor
    time_ids: Tensor
    instance_count: int
    mask: Tensor | None
    prompts: list[str]

    def with_base_as_prior(self, prompts: list[str]) -> "TrainBatch":
        """Twice the batch: the second half has these prompts (B), and the frozen base's answer will be its target."""
        size = len(self.prompts)
        return TrainBatch(
            self.latents.repeat(2, 1, 1, 1),
            self.time_ids.repeat(2, 1),
            size,
            None if self.mask is None else torch.cat([self.mask, torch.ones_like(self.mask)]),
            [*self.prompts, *prompts],
        )


class PhotoEncoder:
    """Crop and encode photos once each: the VAE is asked only for what the cache does not hold."""

    def __init__(
        self,
        vae: AutoencoderKL,
        cache: TensorCache | None,
        rule: CropRule,
        readers: int = 0,
        unmasked_weight: float = 0.0,
    ):
        """`readers` threads open and crop photos ahead of their turn, where nothing is cached."""
        self.vae, self.cache, self.rule, self.unmasked_weight = vae, cache, rule, unmasked_weight
        self.vae_identity = fingerprint(vae)
        self._digests: dict[object, str] = {}
        self._readers = ThreadPoolExecutor(readers) if readers and cache is None else None
        self._reading: dict[tuple[Photo, CropPlan], Future[Crop]] = {}

    def encode(self, photo: Photo, plan: CropPlan) -> EncodedView:
        tensors = (
            self._compute(photo, plan)
            if self.cache is None
            else self.cache.get(self._key(photo, plan), lambda: self._compute_unchanged(photo, plan))
        )
        weights = self._weights(photo, tensors["subject"]) if "subject" in tensors else None
        return EncodedView(tensors["latents"], torch.tensor(plan.time_ids, dtype=torch.float32), weights)

    def _weights(self, photo: Photo, subject: Tensor) -> Tensor:
        """What places weigh: the subject 1, around it `unmasked_weight`, or 0 where the photo itself is transparent:
        the white that it lies on there is nobody's surroundings."""
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
        """Raises UserError for a photo that is not the one of the key any more: it would be kept under another's. And
        for one whose file in the disk cache cannot be read any more when the VAE has left memory."""
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
    """The photo's crop and its mask's, as pictures of the target size."""
    image, mask = apply_crop(open_rgb(photo), plan, interpolation), open_mask(photo)
    return image, None if mask is None else apply_crop(mask, plan, "bilinear")


def pixels_of(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def latent_mask(mask: Image.Image, latents: Tensor) -> Tensor:
    """Grey picture -> (1, h, w) in [0, 1], averaged to the latents' size."""
    grey = torch.from_numpy(np.array(mask, dtype=np.float32))[None, None] / 255
    return F.adaptive_avg_pool2d(grey, latents.shape[-2:])[0]


class PhotoStream:
    """The samples of one set of photos, by position. Two streams of one run differ by `name`."""

    def __init__(
        self,
        photos: Sequence[Photo],
        encoder: PhotoEncoder,
        seed: int,
        name: str,
        repeats: int = 1,
        caption_dropout: float = 0.0,
        batch_size: int = 1,
        beside: "PhotoStream | None" = None,
    ):
        """Each `batch_size` samples from a multiple of it on have crops of one size; all have the size of the sample
        of the stream `beside`, if any, at their position."""
        self.photos, self.encoder, self.seed, self.name, self.repeats = photos, encoder, seed, name, repeats
        self.caption_dropout, self.batch_size, self.beside = caption_dropout, batch_size, beside
        self.groups: dict[Size, list[int]] = {size: [] for size in beside.groups} if beside else {}
        for slot in range(len(self)):
            size_px = photos[slot // repeats].size_px
            target = nearest_shape(size_px, beside.groups) if beside else encoder.rule.target(size_px)
            self.groups.setdefault(target, []).append(slot)

    def __len__(self) -> int:
        """Samples in an epoch."""
        return samples_an_epoch(len(self.photos), self.repeats)

    def at(self, position: int) -> tuple[EncodedView, str]:
        """The view of the sample at `position` >= 0, and one of its photo's captions, drawn anew each time.

        In a share `caption_dropout` of the positions the caption is empty.
        """
        photo, plan = self._sample(position)
        is_dropped = rng(self.seed, self.name, "caption dropout", position).random() < self.caption_dropout
        caption = "" if is_dropped else rng(self.seed, self.name, "caption", position).choice(photo.captions)
        return self.encoder.encode(photo, plan), caption

    def read_ahead(self, position: int) -> None:
        """Begin to read what `at` will be asked for soon."""
        self.encoder.read_ahead(*self._sample(position))

    def _sample(self, position: int) -> tuple[Photo, CropPlan]:
        slot, crop, target = self._view(position)
        return self.photos[slot // self.repeats], self._plan(slot, crop, target)

    @property
    def is_one_size(self) -> bool:
        """Whether batches need no care."""
        return len(self.groups) == 1 or self.batch_size == 1

    def _view(self, position: int) -> View:
        target = None
        if self.beside is not None:
            target = self.beside.size_at(position)
            epoch, slot = self._place_in(target, position)
        elif self.is_one_size:
            epoch, slot = place_of(position, len(self), self.seed, self.name)
        else:
            epoch, slot = self._grouped_place(position)
        crops = self.encoder.rule.crops_per_photo
        return slot, epoch if crops is None else epoch % crops, target or self._size_of(slot)

    def size_at(self, position: int) -> Size:
        """(h, w) of the crop at `position`."""
        return self._view(position)[2]

    def _size_of(self, slot: int) -> Size:
        return self.encoder.rule.target(self.photos[slot // self.repeats].size_px)

    def _place_in(self, size: Size, position: int) -> tuple[int, int]:
        """(epoch, slot) among those of one size; where there are none, among all."""
        slots = self.groups[size] or range(len(self))
        epoch, found = place_of(position, len(slots), self.seed, self.name, size)
        return epoch, slots[found]

    def _grouped_place(self, position: int) -> tuple[int, int]:
        """(epoch of its group, slot). In a round of as many batches as there are slots, each group has as many batches
        as it has slots: so each slot is shown `batch_size` times, whatever the size of its group."""
        batch, place = divmod(position, self.batch_size)
        turn, number = divmod(batch, len(self))
        order = batch_order(tuple((key, len(slots)) for key, slots in self.groups.items()), self.seed, self.name, turn)
        key = order[number]
        slots = self.groups[key]
        batches_before = turn * len(slots) + order[:number].count(key)
        return self._place_in(key, batches_before * self.batch_size + place)

    def view_count(self, sample_count: int) -> int:
        """Views that the first `sample_count` samples show, before they come again; 0 when each epoch crops anew."""
        return len(self._first_positions(sample_count))

    def encode_ahead(self, sample_count: int) -> Iterator[EncodedView]:
        """Each of those views once: this fills the cache."""
        for position in self._first_positions(sample_count):
            yield self.encoder.encode(*self._sample(position))

    def _first_positions(self, sample_count: int) -> list[int]:
        """The position of each view among the first samples; by the bound, every view has been shown."""
        crops = self.encoder.rule.crops_per_photo or 0
        turns = crops if self.is_one_size else self.batch_size * math.ceil(crops / self.batch_size)
        bound = len(self) * turns if self.beside is None else sample_count * (crops > 0)
        views: dict[View, int] = {}
        for position in range(min(sample_count, bound)):
            views.setdefault(self._view(position), position)
        return list(views.values())

    def _plan(self, slot: int, crop: int, target: Size) -> CropPlan:
        draws = rng(self.seed, self.name, "crop", slot, crop)
        return self.encoder.rule.plan(self.photos[slot // self.repeats].size_px, draws, target)


@lru_cache(maxsize=64)
def batch_order(groups: tuple[tuple[object, int], ...], *names: object) -> tuple[object, ...]:
    """Each group's key as often as its count says, shuffled."""
    keys = [key for key, count in groups for _ in range(count)]
    return tuple(rng("batches", *names).sample(keys, len(keys)))


class PromptCache:
    """Prompts -> TextCond. Frozen encoders are asked once a prompt; `release_encoders` then lets them leave memory."""

    def __init__(self, encode: Callable[[list[str]], TextCond], cache: TensorCache | None, identity: str):
        self.encode, self.cache, self.identity = encode, cache, identity

    def __call__(self, prompts: Sequence[str]) -> TextCond:
        found = [self._one(prompt) for prompt in prompts]
        return TextCond(torch.stack([f["embeds"] for f in found]), torch.stack([f["pooled"] for f in found]))

    def _one(self, prompt: str) -> dict[str, Tensor]:
        if self.cache is None:
            return self._compute(prompt)
        return self.cache.get(content_key(prompt=prompt, encoders=self.identity), lambda: self._compute(prompt))

    @torch.no_grad()
    def _compute(self, prompt: str) -> dict[str, Tensor]:
        cond = self.encode([prompt])
        return {"embeds": cond.embeds[0].cpu(), "pooled": cond.pooled[0].cpu()}

    def release_encoders(self) -> None:
        """Drop the encoders. A prompt that was never asked raises RuntimeError from now on, and UserError one whose
        file in the disk cache cannot be read any more."""
        is_on_disk = self.cache is not None and self.cache.folder is not None

        def gone(prompts: list[str]) -> TextCond:
            if is_on_disk:
                raise UserError(
                    f"{self.cache.folder}: the encoding of {prompts[0]!r:.60} cannot be read any more, and the text "
                    "encoders have left memory; resume the run, which encodes it anew."
                )
            raise RuntimeError(f"the text encoders have left memory; {prompts} was not encoded before")

        self.encode = gone


def collate(samples: Sequence[tuple[EncodedView, str]], instance_count: int) -> TrainBatch:
    """Stack views and their captions, the subject's first, into one batch.

    Views without a mask get ones beside views with one.
    """
    views = [view for view, _ in samples]
    masks = None
    if any(view.mask is not None for view in views):
        masks = torch.stack([torch.ones_like(v.latents[:1]) if v.mask is None else v.mask for v in views])
    return TrainBatch(
        torch.stack([view.latents for view in views]),
        torch.stack([view.time_ids for view in views]),
        instance_count,
        masks,
        [caption for _, caption in samples],
    )


def move_together(tensors: dict[str, Tensor | None], device: torch.device) -> dict[str, Tensor | None]:
    """The CPU tensors on `device`, by one transfer that nothing waits for; None stays None.

    They travel as fp32 numbers, which holds whole numbers up to 2**24 and all halves exactly.
    """
    if device.type == "cpu":
        return tensors
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    buffer = torch.cat([tensor.reshape(-1).float() for tensor in given.values()])
    if device.type == "cuda":
        buffer = buffer.pin_memory()
    parts = buffer.to(device, non_blocking=True).split([tensor.numel() for tensor in given.values()])
    moved = {
        name: part.view(tensor.shape).to(tensor.dtype)
        for part, (name, tensor) in zip(parts, given.items(), strict=True)
    }
    return tensors | moved
