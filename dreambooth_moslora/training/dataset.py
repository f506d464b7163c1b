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
from dreambooth_moslora.disk.contents import hash_file, hash_values
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos import augment, caption_variants, photo_file
from dreambooth_moslora.seeds import seed_rng, shuffle_index
from dreambooth_moslora.settings import subjects, train_config
from dreambooth_moslora.training.encoding_cache import EncodingCache, Tensors, digest_tensors

LatentBucket = tuple[int, int]
"""(h, w) in px."""
CropKey = tuple[int, int, LatentBucket]
"""(slot, crop number, crop size); the slot numbers photos times repeats."""


@dataclass(frozen=True)
class EncodedCrop:
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
    cache: EncodingCache | None
    rule: augment.CropRule
    unmasked_weight: float = 0.0
    family: families.Family = load.SDXL_FAMILY
    synthetic_weight: float = 1.0
    vae_digest: str = ""

    def __post_init__(self) -> None:
        # The scale of the latents is no weight, so the configuration is part of the identity.
        config = self.vae.config.items()
        constants = {name: value for name, value in config if not name.startswith("_")}
        self.vae_identity = hash_values(
            weights=self.vae_digest or digest_tensors(self.vae.state_dict()),
            dtype=self.vae.dtype,
            family=self.family.facts.name,
            constants=constants,
        )
        self._digest = lru_cache(maxsize=None)(hash_file)

    def encode(self, photo: photo_file.Photo, plan: augment.CropPlan) -> EncodedCrop:
        """Loss weights are 1 on the subject, `unmasked_weight` around it, 0 where a photo is
        transparent; all times `synthetic_weight` of a photo that a model made."""
        if self.cache is None:
            tensors = self._encode_crop(photo, plan)
        else:
            tensors = self.cache.get(*self.build_crop_entry(photo, plan))

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
        return EncodedCrop(
            latents=tensors["latents"],
            time_ids=torch.tensor(plan.time_ids, dtype=torch.float32),
            mask=weights,
        )

    def build_crop_entry(
        self, photo: photo_file.Photo, plan: augment.CropPlan
    ) -> tuple[str, Callable[[], Tensors]]:
        """The crop's key in the cache, and the function that encodes it. That raises UserError if
        the cache was changed after the VAE had left memory."""
        # All that the encoding depends on: pixels, mask, crop and VAE.
        key = hash_values(
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
            return self._encode_crop(photo, plan)

        return key, compute

    def _encode_crop(self, photo: photo_file.Photo, plan: augment.CropPlan) -> Tensors:
        """Latents (C, h, w), and "subject" and "opaque" (1, h, w) in [0, 1], if the photo has
        them."""
        image, weights = self.load_crop(photo, plan)
        latents = load.encode_image(self.vae, convert_to_tensor(image)[None], self.family)[0].cpu()

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
        image = photo_file.require_image(photo.path)
        parts = {"subject": photo_file.open_mask(photo)}
        if photo.has_mask_file:
            parts["opaque"] = photo_file.get_alpha(image)

        # Every part has the photo's size, so one plan cuts them all.
        cut = {}
        for name, part in parts.items():
            if part is not None:
                cut[name] = augment.apply_crop(part, plan, Image.Resampling.BILINEAR)
        picture = photo_file.to_rgb(image)
        return augment.apply_crop(picture, plan), cut


def convert_to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB picture -> (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


@dataclass(eq=False)
class PhotoDataset:
    """The samples of one set of photos, by position.

    photos: at least one
    encoder: crops and encodes them
    seed: of all draws
    name: by which two streams of one run differ
    repeats: how often an epoch shows each photo
    caption_dropout: share of samples with an empty caption
    batch_size: samples in a row that have crops of one size
    size_source: a stream whose crop sizes this one has, at each position
    bare_share: share of samples with the bare prompt, of photos that have one
    """

    photos: Sequence[photo_file.Photo]
    encoder: PhotoEncoder
    seed: int
    name: str
    repeats: int = 1
    caption_dropout: float = 0.0
    batch_size: int = 1
    size_source: "PhotoDataset | None" = None
    bare_share: float = 0.0

    def __post_init__(self) -> None:
        # The slots of each crop size. Beside another stream there are only its sizes.
        of_beside = self.size_source.buckets if self.size_source else {}
        self.buckets: dict[LatentBucket, list[int]] = {size: [] for size in of_beside}
        for slot in range(len(self)):
            size_px = self.photos[slot // self.repeats].size_px
            target = self.encoder.rule.get_target_size(size_px)
            if of_beside:
                target = augment.find_nearest_shape(size_px, of_beside)
            self.buckets.setdefault(target, []).append(slot)

    def __len__(self) -> int:
        """Samples per epoch."""
        return len(self.photos) * self.repeats

    def get_sample(self, position: int) -> tuple[EncodedCrop, str]:
        """The view at `position` >= 0, and a caption: empty by `caption_dropout`, bare by
        `bare_prompt_share`, or random."""
        photo, plan = self._plan_crop(position)
        view = self.encoder.encode(photo, plan)
        if self._is_selected(self.caption_dropout, "caption dropout", position):
            return view, ""
        if photo.bare_prompt and self._is_selected(self.bare_share, "bare prompt", position):
            return view, photo.bare_prompt
        return view, seed_rng(self.seed, self.name, "caption", position).choice(photo.captions)

    def _is_selected(self, share: float, what: str, position: int) -> bool:
        return seed_rng(self.seed, self.name, what, position).random() < share

    @property
    def captions(self) -> set[str]:
        """Every caption that `at` may return, but for the empty one."""
        bare = {photo.bare_prompt for photo in self.photos if photo.bare_prompt and self.bare_share}
        return bare.union(*(photo.captions for photo in self.photos))

    def _plan_crop(self, position: int) -> tuple[photo_file.Photo, augment.CropPlan]:
        slot, crop, target = self._find_crop(position)
        photo = self.photos[slot // self.repeats]
        draws = seed_rng(self.seed, self.name, "crop", slot, crop)
        return photo, self.encoder.rule.plan_crop(photo.size_px, draws, target, photo.face)

    def _find_crop(self, position: int) -> CropKey:
        """What `position` shows. Where batches need one size, each group of slots has as many of a
        round's batches as it has slots, so that all are shown equally often."""
        target = None

        # Beside another stream: its size, of one's own slots.
        if self.size_source is not None:
            target = self.size_source._find_crop(position)[2]
            epoch, slot = self._find_photo_index(target, position)

        # Any samples fit together: the slots are shuffled in each epoch.
        elif len(self.buckets) == 1 or self.batch_size == 1:
            epoch, slot = shuffle_index(position, len(self), self.seed, self.name)

        # A round is as many batches as there are slots, in an order of groups drawn for it. How
        # many batches of this group came before gives the place among its slots.
        else:
            batch, place = divmod(position, self.batch_size)
            turn, number = divmod(batch, len(self))
            counts = tuple((key, len(slots)) for key, slots in self.buckets.items())
            order = shuffle_batches(counts, self.seed, self.name, turn)
            key = order[number]
            batches_before = turn * len(self.buckets[key]) + order[:number].count(key)
            epoch, slot = self._find_photo_index(key, batches_before * self.batch_size + place)

        # Each epoch has the next crop of a photo.
        crops = self.encoder.rule.crops_per_photo
        crop = epoch if crops is None else epoch % crops
        if target is None:
            target = self.encoder.rule.get_target_size(self.photos[slot // self.repeats].size_px)
        return slot, crop, target

    def _find_photo_index(self, size: LatentBucket, position: int) -> tuple[int, int]:
        """(epoch, slot) among the slots of this size, or among all if there are none."""
        slots = self.buckets[size] or range(len(self))
        epoch, found = shuffle_index(position, len(slots), self.seed, self.name, size)
        return epoch, slots[found]

    def list_crops(self, sample_count: int) -> list[tuple[photo_file.Photo, augment.CropPlan]]:
        """The different views among the first `sample_count` samples; none when each epoch crops
        anew."""
        if not self.encoder.rule.crops_per_photo:
            return []
        first: dict[CropKey, int] = {}
        for position in range(sample_count):
            first.setdefault(self._find_crop(position), position)
        return [self._plan_crop(position) for position in first.values()]


@lru_cache(maxsize=64)
def shuffle_batches(groups: tuple[tuple[object, int], ...], *names: object) -> tuple[object, ...]:
    """The groups' keys, each as often as its count, shuffled."""
    keys = [key for key, count in groups for _ in range(count)]
    return tuple(seed_rng("batches", *names).sample(keys, len(keys)))


@dataclass(frozen=True)
class SubjectsDataset:
    """Takes turns between one stream per subject.

    datasets: one of each subject
    seed: of the order
    run_length: samples in a row that show the same subject
    """

    datasets: Sequence[PhotoDataset]
    seed: int
    run_length: int = 1

    @property
    def captions(self) -> set[str]:
        return set().union(*(stream.captions for stream in self.datasets))

    @property
    def encoder(self) -> PhotoEncoder:
        """The one that all streams share."""
        return self.datasets[0].encoder

    def get_subject(self, position: int) -> int:
        """The number of the subject that is shown there."""
        return self._find_sample(position)[0]

    def get_sample(self, position: int) -> tuple[EncodedCrop, str]:
        """The view at `position` >= 0, and its caption."""
        number, place = self._find_sample(position)
        return self.datasets[number].get_sample(place)

    def _find_sample(self, position: int) -> tuple[int, int]:
        """(number of the stream, position in it)."""
        turn, offset = divmod(position, self.run_length)
        round_, number = shuffle_index(turn, len(self.datasets), self.seed, "subjects")
        return number, round_ * self.run_length + offset

    def list_crops(self, sample_count: int) -> list[tuple[photo_file.Photo, augment.CropPlan]]:
        """Like `PhotoDataset.list_crops`, of all subjects, in whole rounds."""
        rounds = math.ceil(sample_count / (len(self.datasets) * self.run_length))
        share = rounds * self.run_length
        return [view for stream in self.datasets for view in stream.list_crops(share)]


def build_instance_dataset(
    config: train_config.TrainConfig, photos: list[photo_file.Photo], encoder: PhotoEncoder
) -> SubjectsDataset:
    """The streams of the subjects' photos; with buckets a batch shows one subject."""
    streams = []
    for number, subject in enumerate(config.each_subject):
        own = []
        for photo in photos:
            if photo.subject == number:
                captions = caption_variants.shuffle_captions(subject, photo.captions)
                own.append(replace(photo, captions=captions))
        stream = PhotoDataset(
            photos=own,
            encoder=encoder,
            seed=config.seed,
            name=subjects.get_seed_name("instance", number),
            repeats=config.repeats,
            caption_dropout=config.caption_dropout,
            batch_size=config.train_batch_size,
            bare_share=subject.bare_prompt_share,
        )
        streams.append(stream)

    # With buckets, a batch has one size, and so one subject.
    run = config.train_batch_size if config.enable_bucket else 1
    return SubjectsDataset(streams, seed=config.seed, run_length=run)


def build_prior_dataset(
    config: train_config.TrainConfig,
    class_photos: list[list[photo_file.Photo]],
    encoder: PhotoEncoder,
    instance: SubjectsDataset,
) -> SubjectsDataset:
    """The streams of class images: beside each sample one of its class; with buckets, of the same
    size."""
    streams = []
    for number, (photos, own) in enumerate(zip(class_photos, instance.datasets, strict=True)):
        stream = PhotoDataset(
            photos=photos,
            encoder=encoder,
            seed=config.seed,
            name=subjects.get_seed_name("prior", number),
            size_source=own if config.enable_bucket else None,
        )
        streams.append(stream)
    return SubjectsDataset(streams, seed=config.seed, run_length=instance.run_length)


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

    def add_base_prior(self, prompts: list[str]) -> "TrainBatch":
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


def collate(samples: Sequence[tuple[EncodedCrop, str]], instance_count: int) -> TrainBatch:
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


def move_tensors(
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
