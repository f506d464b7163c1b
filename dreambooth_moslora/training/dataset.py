"""From photos to batches: the endless, shuffled, seeded stream of encoded crops with captions, of
all subjects.

    sample at position p  ->  (photo, repeat, crop)  ->  EncodedView  ->  TrainBatch

Each epoch shuffles photos × repeats. The crop number is epoch mod `crops_per_photo`; without a
cache every epoch has fresh crops. Each of several subjects is shown equally often, whatever its
number of photos:

position p  ->  round p div k, subject (order drawn anew each round)  ->  that subject's stream at
the round

The position alone determines the sample: resumed or distributed runs show what an unbroken run of
one process shows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dreambooth_moslora.base import families, load
from dreambooth_moslora.disk.contents import content_key, file_digest
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos import augment, caption_variants, photo_file
from dreambooth_moslora.seeds import place_of, rng
from dreambooth_moslora.settings import subjects, train_config
from dreambooth_moslora.training.encoding_cache import TensorCache, Tensors, digest_of

Size = tuple[int, int]
"""(h, w) in px."""
View = tuple[int, int, Size]
"""(slot, crop number, crop size); the slot numbers photos times repeats."""


@dataclass(frozen=True)
class EncodedView:
    """One crop of a photo, encoded.

    latents: (C, h, w)
    time_ids: (6,) sizes and crop in px
    mask: (1, h, w) the loss weights in [0, 1]; None without a mask
    """

    latents: torch.Tensor
    time_ids: torch.Tensor
    mask: torch.Tensor | None


@dataclass(eq=False)
class PhotoEncoder:
    """Crops and encodes photos. The VAE computes only what the cache does not hold.

    vae: the encoder; None once it has left memory
    cache: what it gave; None to encode at each draw
    rule: how photos are cropped
    unmasked_weight: the loss weight around the subject, in [0, 1]
    family: how its kind of latents is scaled
    synthetic_weight: the loss weight of photos that a model made, in [0, 1]
    vae_digest: of the VAE's files (`base.digests`); "" for that of its weights in memory
    """

    vae: torch.nn.Module
    cache: TensorCache | None
    rule: augment.CropRule
    unmasked_weight: float = 0.0
    family: families.Family = load.SDXL_FAMILY
    synthetic_weight: float = 1.0
    vae_digest: str = ""

    def __post_init__(self) -> None:
        # The scale of the latents is no weight, so the configuration is part of the identity.
        config = self.vae.config.items()
        constants = {name: value for name, value in config if not name.startswith("_")}
        self.vae_identity = content_key(
            weights=self.vae_digest or digest_of(self.vae.state_dict()),
            dtype=self.vae.dtype,
            family=self.family.facts.name,
            constants=constants,
        )
        self._digest = lru_cache(maxsize=None)(file_digest)

    def encode(self, photo: photo_file.Photo, plan: augment.CropPlan) -> EncodedView:
        """Loss weights are 1 on the subject, `unmasked_weight` around it, 0 where a photo is
        transparent; all times `synthetic_weight` of a photo that a model made."""
        if self.cache is None:
            tensors = self._compute(photo, plan)
        else:
            tensors = self.cache.get(*self.entry(photo, plan))

        # A mask that is the photo's own transparency has nothing around the subject to weigh.
        around = 0.0 if photo.mask_path == photo.path else self.unmasked_weight
        weights = None
        if "subject" in tensors:
            weights = around + (1 - around) * tensors["subject"]
        if "opaque" in tensors:
            weights = weights * tensors["opaque"]
        if photo.made_by:
            whole = torch.ones_like(tensors["latents"][:1])
            weights = self.synthetic_weight * (whole if weights is None else weights)
        return EncodedView(
            latents=tensors["latents"],
            time_ids=torch.tensor(plan.time_ids, dtype=torch.float32),
            mask=weights,
        )

    def entry(
        self, photo: photo_file.Photo, plan: augment.CropPlan
    ) -> tuple[str, Callable[[], Tensors]]:
        """The crop's key in the cache, and the function that encodes it. That raises UserError if
        the cache was changed after the VAE had left memory."""
        # All that the encoding depends on: pixels, mask, crop and VAE.
        key = content_key(
            photo=self._digest(photo.path),
            subject=photo.mask_path and self._digest(photo.mask_path),
            plan=plan,
            vae=self.vae_identity,
        )

        def compute() -> Tensors:
            if self.vae is None:
                raise UserError(
                    f"{self.cache.folder}: the encoding of {photo.path} cannot be read any more, "
                    "and the VAE has left memory; resume the run, which encodes it anew."
                )
            return self._compute(photo, plan)

        return key, compute

    def _compute(self, photo: photo_file.Photo, plan: augment.CropPlan) -> Tensors:
        """Latents (C, h, w), and "subject" and "opaque" (1, h, w) in [0, 1], if the photo has
        them."""
        image, weights = self.load_crop(photo, plan)
        latents = load.encode_image(self.vae, pixels_of(image)[None], self.family)[0].cpu()

        # A weight of a latent is the mean of its pixels'.
        tensors = {"latents": latents}
        for name, part in weights.items():
            grey = torch.from_numpy(np.array(part, dtype=np.float32))[None, None] / 255
            tensors[name] = F.adaptive_avg_pool2d(grey, latents.shape[-2:])[0]
        return tensors

    def load_crop(
        self, photo: photo_file.Photo, plan: augment.CropPlan
    ) -> tuple[Image.Image, dict[str, Image.Image]]:
        """The crop as RGB, and as L the mask ("subject") and what is opaque beside a mask file
        ("opaque")."""
        image = photo_file.open_again(photo.path)
        parts = {"subject": photo_file.open_mask(photo)}
        if photo.has_mask_file:
            parts["opaque"] = photo_file.alpha_of(image)

        # Every part has the photo's size, so one plan cuts them all.
        cut = {}
        for name, part in parts.items():
            if part is not None:
                cut[name] = augment.apply_crop(part, plan, Image.Resampling.BILINEAR)
        picture = photo_file.to_rgb(image)
        return augment.apply_crop(picture, plan), cut


def pixels_of(image: Image.Image) -> torch.Tensor:
    """RGB picture -> (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


@dataclass(eq=False)
class PhotoStream:
    """The samples of one set of photos, by position.

    photos: at least one
    encoder: crops and encodes them
    seed: of all draws
    name: by which two streams of one run differ
    repeats: how often an epoch shows each photo
    caption_dropout: share of samples with an empty caption
    batch_size: samples in a row that have crops of one size
    beside: a stream whose crop sizes this one has, at each position
    bare_share: share of samples with the bare prompt, of photos that have one
    """

    photos: Sequence[photo_file.Photo]
    encoder: PhotoEncoder
    seed: int
    name: str
    repeats: int = 1
    caption_dropout: float = 0.0
    batch_size: int = 1
    beside: "PhotoStream | None" = None
    bare_share: float = 0.0

    def __post_init__(self) -> None:
        # The slots of each crop size. Beside another stream there are only its sizes.
        of_beside = self.beside.groups if self.beside else {}
        self.groups: dict[Size, list[int]] = {size: [] for size in of_beside}
        for slot in range(len(self)):
            size_px = self.photos[slot // self.repeats].size_px
            target = self.encoder.rule.target(size_px)
            if of_beside:
                target = augment.nearest_shape(size_px, of_beside)
            self.groups.setdefault(target, []).append(slot)

    def __len__(self) -> int:
        """Samples per epoch."""
        return len(self.photos) * self.repeats

    def at(self, position: int) -> tuple[EncodedView, str]:
        """The view at `position` >= 0, and a caption: empty by `caption_dropout`, bare by
        `bare_share`, or random."""
        photo, plan = self._sample(position)
        view = self.encoder.encode(photo, plan)
        if self._is_in(self.caption_dropout, "caption dropout", position):
            return view, ""
        if photo.bare_prompt and self._is_in(self.bare_share, "bare prompt", position):
            return view, photo.bare_prompt
        return view, rng(self.seed, self.name, "caption", position).choice(photo.captions)

    def _is_in(self, share: float, what: str, position: int) -> bool:
        return rng(self.seed, self.name, what, position).random() < share

    @property
    def captions(self) -> set[str]:
        """Every caption that `at` may return, but for the empty one."""
        bare = {photo.bare_prompt for photo in self.photos if photo.bare_prompt and self.bare_share}
        return bare.union(*(photo.captions for photo in self.photos))

    def _sample(self, position: int) -> tuple[photo_file.Photo, augment.CropPlan]:
        slot, crop, target = self._view(position)
        photo = self.photos[slot // self.repeats]
        draws = rng(self.seed, self.name, "crop", slot, crop)
        return photo, self.encoder.rule.plan(photo.size_px, draws, target, photo.face)

    def _view(self, position: int) -> View:
        """What `position` shows. Where batches need one size, each group of slots has as many of a
        round's batches as it has slots, so that all are shown equally often."""
        target = None

        # Beside another stream: its size, of one's own slots.
        if self.beside is not None:
            target = self.beside._view(position)[2]
            epoch, slot = self._place_in(target, position)

        # Any samples fit together: the slots are shuffled in each epoch.
        elif len(self.groups) == 1 or self.batch_size == 1:
            epoch, slot = place_of(position, len(self), self.seed, self.name)

        # A round is as many batches as there are slots, in an order of groups drawn for it. How
        # many batches of this group came before gives the place among its slots.
        else:
            batch, place = divmod(position, self.batch_size)
            turn, number = divmod(batch, len(self))
            counts = tuple((key, len(slots)) for key, slots in self.groups.items())
            order = batch_order(counts, self.seed, self.name, turn)
            key = order[number]
            batches_before = turn * len(self.groups[key]) + order[:number].count(key)
            epoch, slot = self._place_in(key, batches_before * self.batch_size + place)

        # Each epoch has the next crop of a photo.
        crops = self.encoder.rule.crops_per_photo
        crop = epoch if crops is None else epoch % crops
        if target is None:
            target = self.encoder.rule.target(self.photos[slot // self.repeats].size_px)
        return slot, crop, target

    def _place_in(self, size: Size, position: int) -> tuple[int, int]:
        """(epoch, slot) among the slots of this size, or among all if there are none."""
        slots = self.groups[size] or range(len(self))
        epoch, found = place_of(position, len(slots), self.seed, self.name, size)
        return epoch, slots[found]

    def views_ahead(self, sample_count: int) -> list[tuple[photo_file.Photo, augment.CropPlan]]:
        """The different views among the first `sample_count` samples; none when each epoch crops
        anew."""
        if not self.encoder.rule.crops_per_photo:
            return []
        first: dict[View, int] = {}
        for position in range(sample_count):
            first.setdefault(self._view(position), position)
        return [self._sample(position) for position in first.values()]


@lru_cache(maxsize=64)
def batch_order(groups: tuple[tuple[object, int], ...], *names: object) -> tuple[object, ...]:
    """The groups' keys, each as often as its count, shuffled."""
    keys = [key for key, count in groups for _ in range(count)]
    return tuple(rng("batches", *names).sample(keys, len(keys)))


@dataclass(frozen=True)
class SubjectStreams:
    """Takes turns between one stream per subject.

    streams: one of each subject
    seed: of the order
    run: samples in a row that show the same subject
    """

    streams: Sequence[PhotoStream]
    seed: int
    run: int = 1

    @property
    def captions(self) -> set[str]:
        return set().union(*(stream.captions for stream in self.streams))

    @property
    def encoder(self) -> PhotoEncoder:
        """The one that all streams share."""
        return self.streams[0].encoder

    def subject_at(self, position: int) -> int:
        """The number of the subject that is shown there."""
        return self._place(position)[0]

    def at(self, position: int) -> tuple[EncodedView, str]:
        """The view at `position` >= 0, and its caption."""
        number, place = self._place(position)
        return self.streams[number].at(place)

    def _place(self, position: int) -> tuple[int, int]:
        """(number of the stream, position in it)."""
        turn, offset = divmod(position, self.run)
        round_, number = place_of(turn, len(self.streams), self.seed, "subjects")
        return number, round_ * self.run + offset

    def views_ahead(self, sample_count: int) -> list[tuple[photo_file.Photo, augment.CropPlan]]:
        """Like `PhotoStream.views_ahead`, of all subjects, in whole rounds."""
        rounds = math.ceil(sample_count / (len(self.streams) * self.run))
        share = rounds * self.run
        return [view for stream in self.streams for view in stream.views_ahead(share)]


def instance_streams(
    config: train_config.TrainConfig, photos: list[photo_file.Photo], encoder: PhotoEncoder
) -> SubjectStreams:
    """The streams of the subjects' photos; with buckets a batch shows one subject."""
    streams = []
    for number, subject in enumerate(config.each_subject):
        own = []
        for photo in photos:
            if photo.subject == number:
                captions = caption_variants.shuffled_captions(subject, photo.captions)
                own.append(replace(photo, captions=captions))
        stream = PhotoStream(
            photos=own,
            encoder=encoder,
            seed=config.seed,
            name=subjects.stream_of("instance", number),
            repeats=config.repeats,
            caption_dropout=config.caption_dropout,
            batch_size=config.train_batch_size,
            bare_share=subject.bare_share,
        )
        streams.append(stream)

    # With buckets, a batch has one size, and so one subject.
    run = config.train_batch_size if config.enable_bucket else 1
    return SubjectStreams(streams, seed=config.seed, run=run)


def prior_streams(
    config: train_config.TrainConfig,
    class_photos: list[list[photo_file.Photo]],
    encoder: PhotoEncoder,
    instance: SubjectStreams,
) -> SubjectStreams:
    """The streams of class images: beside each sample one of its class; with buckets, of the same
    size."""
    streams = []
    for number, (photos, own) in enumerate(zip(class_photos, instance.streams, strict=True)):
        stream = PhotoStream(
            photos=photos,
            encoder=encoder,
            seed=config.seed,
            name=subjects.stream_of("prior", number),
            beside=own if config.enable_bucket else None,
        )
        streams.append(stream)
    return SubjectStreams(streams, seed=config.seed, run=instance.run)


@dataclass(frozen=True)
class TrainBatch:
    """B samples, on the CPU.

    latents: (B, C, h, w)
    time_ids: (B, 6) sizes and crops in px
    instance_count: how many are of the subject; they come first, then prior images
    mask: (B, 1, h, w) loss weights in [0, 1]; None without masks
    prompts: (B)
    """

    latents: torch.Tensor
    time_ids: torch.Tensor
    instance_count: int
    mask: torch.Tensor | None
    prompts: list[str]

    def with_base_as_prior(self, prompts: list[str]) -> "TrainBatch":
        """The batch twice (2B): the second half has these prompts (B), and the base's prediction as
        its target."""
        mask = None
        if self.mask is not None:
            mask = torch.cat([self.mask, torch.ones_like(self.mask)])
        return TrainBatch(
            latents=self.latents.repeat(2, 1, 1, 1),
            time_ids=self.time_ids.repeat(2, 1),
            instance_count=len(self.prompts),
            mask=mask,
            prompts=[*self.prompts, *prompts],
        )


def collate(samples: Sequence[tuple[EncodedView, str]], instance_count: int) -> TrainBatch:
    """One batch, the subject's views first. If only some have a mask, the others get a mask of
    ones."""
    views = [view for view, _ in samples]
    masks = None
    if any(view.mask is not None for view in views):
        filled = []
        for view in views:
            filled.append(torch.ones_like(view.latents[:1]) if view.mask is None else view.mask)
        masks = torch.stack(filled)
    return TrainBatch(
        latents=torch.stack([view.latents for view in views]),
        time_ids=torch.stack([view.time_ids for view in views]),
        instance_count=instance_count,
        mask=masks,
        prompts=[caption for _, caption in samples],
    )


def move_together(
    tensors: dict[str, torch.Tensor | None], device: torch.device
) -> dict[str, torch.Tensor | None]:
    """The CPU tensors, or None, on `device`, by one transfer as fp32, asynchronous on CUDA (pinned
    memory)."""
    if device.type == "cpu":
        return tensors

    # All in one buffer: many small transfers would each wait for the device.
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    buffer = torch.cat([tensor.reshape(-1).float() for tensor in given.values()])
    is_cuda = device.type == "cuda"
    if is_cuda:
        buffer = buffer.pin_memory()
    moved = buffer.to(device, non_blocking=is_cuda)

    # Each gets its part, in its own shape and dtype.
    parts = moved.split([tensor.numel() for tensor in given.values()])
    for part, (name, tensor) in zip(parts, given.items(), strict=True):
        given[name] = part.view(tensor.shape).to(tensor.dtype)
    return tensors | given
