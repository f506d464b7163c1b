"""Datasets of encoded photos, and the data loader that makes batches of them.

    photos  ->  PhotoDataset[index]  ->  (EncodedCrop, caption)  ->  collate  ->  TrainBatch

As in PyTorch, a dataset is map-style: the index alone determines the sample, and an index may be
asked for in any order. So a resumed run, or one of several processes, gets the samples that an
unbroken run of one process gets. Indices do not end: each epoch shuffles photos × repeats ×
resolutions anew, and has the next of a photo's `crops_per_photo` crops, or fresh crops where
nothing is cached.

With several subjects, `SubjectsDataset` takes turns between one dataset per subject, so that each
is shown equally often, whatever its number of photos:

    index i  ->  round i div k, subject (in an order shuffled each round)  ->  its dataset[round]

To give the denoiser another input for each photo, add it to `photo_inputs` in
`PhotoEncoder.encode`, and take it by its name in the `predict` of the families that have it
(`base/families.py`). Batches are collated, moved, joined and split by the names alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from dreambooth_moslora.base import families, load
from dreambooth_moslora.disk.contents import hash_file, hash_values
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos import augment, caption_variants, photo_file
from dreambooth_moslora.seeds import seed_rng, shuffle_index
from dreambooth_moslora.settings import subjects, train_config
from dreambooth_moslora.training.encoding_cache import EncodingCache, Tensors, digest_tensors

BucketSize = tuple[int, int]
"""(h, w) of crops in px."""
CropKey = tuple[int, int, BucketSize]
"""(item, crop index, crop size); items number photos × repeats × resolutions."""


@dataclass(frozen=True)
class EncodedCrop:
    """Encoded crop of a photo.

    latents: (C, h, w)
    photo_inputs: further inputs of the denoiser by name: "time_ids" (6,), sizes and crop in px
    mask: (1, h, w) loss weights in [0, 1]; None without a mask
    """

    latents: torch.Tensor
    photo_inputs: dict[str, torch.Tensor]
    mask: torch.Tensor | None


@dataclass(eq=False)
class PhotoEncoder:
    """Crop photos and encode the crops. The VAE computes only what the cache does not hold.

    vae: the encoder; None once it has left memory
    cache: latents by a digest of all that they depend on; None to encode each sample anew
    rule: how photos are cropped
    unmasked_weight: loss weight around the subject, in [0, 1]
    family: scales the latents
    synthetic_weight: loss weight of photos that a model made, in [0, 1]
    vae_digest: digest of the VAE's files (`base.digests`); "" to digest its weights in memory
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
        """Return the encoded crop, from the cache or else computed.

        Loss weights are 1 on the subject, `unmasked_weight` around it, and 0 where a photo is
        transparent. Those of a photo that a model made are multiplied by `synthetic_weight`.
        """
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
        time_ids = torch.tensor(plan.time_ids, dtype=torch.float32)
        return EncodedCrop(tensors["latents"], {"time_ids": time_ids}, mask=weights)

    def build_crop_entry(
        self, photo: photo_file.Photo, plan: augment.CropPlan
    ) -> tuple[str, Callable[[], Tensors]]:
        """Return the crop's key in the cache, and the function that encodes it. That function
        raises UserError where the cache was changed after the VAE had left memory."""
        # All that the encoding depends on: pixels, mask, crop and VAE.
        key = hash_values(
            photo=self._digest(photo.path),
            subject=photo.mask_path and self._digest(photo.mask_path),
            plan=plan,
            vae=self.vae_identity,
        )

        def encode_again() -> Tensors:
            if self.vae is None:
                raise UserError(
                    f"{self.cache.folder}: the encoding of {photo.path} cannot be read any more, "
                    "and the VAE has left memory; resume the run, which encodes it anew."
                )
            return self._encode_crop(photo, plan)

        return key, encode_again

    def _encode_crop(self, photo: photo_file.Photo, plan: augment.CropPlan) -> Tensors:
        """Return latents (C, h, w), and "subject" and "opaque" (1, h, w) in [0, 1] where the photo
        has them."""
        image, masks = self.load_crop(photo, plan)
        latents = load.encode_image(self.vae, convert_to_tensor(image)[None], self.family)[0].cpu()

        # The weight of a latent is the mean of its pixels' weights.
        tensors = {"latents": latents}
        for name, mask in masks.items():
            grey = torch.from_numpy(np.array(mask, dtype=np.float32))[None, None] / 255
            tensors[name] = F.adaptive_avg_pool2d(grey, latents.shape[-2:])[0]
        return tensors

    def load_crop(
        self, photo: photo_file.Photo, plan: augment.CropPlan
    ) -> tuple[Image.Image, dict[str, Image.Image]]:
        """Return the crop as an RGB image, and its masks as grey ones: "subject", and "opaque"
        where a mask file lies beside a photo with transparency."""
        image = photo_file.require_image(photo.path)
        masks = {"subject": photo_file.open_mask(photo)}
        if photo.has_mask_file:
            masks["opaque"] = photo_file.get_alpha(image)

        # All have the photo's size, so one plan crops them all.
        cropped_masks = {}
        for name, mask in masks.items():
            if mask is not None:
                cropped_masks[name] = augment.apply_crop(mask, plan, Image.Resampling.BILINEAR)
        return augment.apply_crop(photo_file.to_rgb(image), plan), cropped_masks


def convert_to_tensor(image: Image.Image) -> torch.Tensor:
    """Convert an RGB image to a tensor (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


@dataclass(eq=False)
class PhotoDataset(Dataset):
    """Map-style dataset of the encoded crops of some photos, each with a caption.

    photos: at least one
    encoder: crops and encodes them
    seed: of all random draws
    name: tells the draws of two datasets of a run apart
    repeats: how often an epoch shows each photo
    caption_dropout: share of samples with an empty caption
    batch_size: consecutive samples that have crops of one size
    size_source: dataset whose crop size this one has at each index
    bare_prompt_share: share of samples with the bare prompt, of photos that have one
    """

    photos: Sequence[photo_file.Photo]
    encoder: PhotoEncoder
    seed: int
    name: str
    repeats: int = 1
    caption_dropout: float = 0.0
    batch_size: int = 1
    size_source: "PhotoDataset | None" = None
    bare_prompt_share: float = 0.0

    def __post_init__(self) -> None:
        # The items of each crop size. With a size source only its sizes are used.
        allowed_sizes = self.size_source.buckets if self.size_source else {}
        self.buckets: dict[BucketSize, list[int]] = {size: [] for size in allowed_sizes}
        for item in range(len(self)):
            crop_size = self._get_crop_size(item)
            if allowed_sizes:
                size_px = self._get_photo(item).size_px
                crop_size = augment.find_nearest_shape(size_px, allowed_sizes)
            self.buckets.setdefault(crop_size, []).append(item)

    def __len__(self) -> int:
        """Return the samples of an epoch; indices go on beyond it."""
        return len(self.photos) * self._items_per_photo

    def __getitem__(self, index: int) -> tuple[EncodedCrop, str]:
        """Return a crop and its caption: empty by `caption_dropout`, the bare prompt by
        `bare_prompt_share`, else one of the photo's."""
        photo, plan = self._plan_crop(index)
        crop = self.encoder.encode(photo, plan)
        if self._is_selected(self.caption_dropout, "caption dropout", index):
            return crop, ""
        if photo.bare_prompt and self._is_selected(self.bare_prompt_share, "bare prompt", index):
            return crop, photo.bare_prompt
        return crop, seed_rng(self.seed, self.name, "caption", index).choice(photo.captions)

    @property
    def _items_per_photo(self) -> int:
        return self.repeats * self.encoder.rule.resolution_count

    def _get_photo(self, item: int) -> photo_file.Photo:
        return self.photos[item // self._items_per_photo]

    def _get_crop_size(self, item: int) -> BucketSize:
        """Return the crop size of an item, of the resolutions by turns."""
        rule = self.encoder.rule
        return rule.get_target_size(self._get_photo(item).size_px, item % rule.resolution_count)

    def _is_selected(self, share: float, draw_name: str, index: int) -> bool:
        return seed_rng(self.seed, self.name, draw_name, index).random() < share

    @property
    def captions(self) -> set[str]:
        """Every caption that a sample may have, but for the empty one."""
        bare_prompts = {photo.bare_prompt for photo in self.photos if self.bare_prompt_share}
        return (bare_prompts - {None}).union(*(photo.captions for photo in self.photos))

    def _plan_crop(self, index: int) -> tuple[photo_file.Photo, augment.CropPlan]:
        item, crop_index, crop_size = self._find_crop(index)
        photo = self._get_photo(item)
        draws = seed_rng(self.seed, self.name, "crop", item, crop_index)
        return photo, self.encoder.rule.plan_crop(photo.size_px, draws, crop_size, photo.face)

    def _find_crop(self, index: int) -> CropKey:
        """Return which crop a sample shows."""
        crop_size = None

        # With a size source: an item of the size that the source has at this index.
        if self.size_source is not None:
            crop_size = self.size_source._find_crop(index)[2]
            epoch, item = self._find_item(crop_size, index)

        # Samples of any sizes can be collated: all items are shuffled together.
        elif len(self.buckets) == 1 or self.batch_size == 1:
            epoch, item = shuffle_index(index, len(self), self.seed, self.name)

        # Each batch has one bucket. In a round a bucket has as many batches as it has items, so
        # that every photo is shown equally often. The bucket's earlier batches tell its next item.
        else:
            batch_index, offset = divmod(index, self.batch_size)
            round_index, turn = divmod(batch_index, len(self))
            item_counts = tuple((size, len(items)) for size, items in self.buckets.items())
            order = shuffle_batches(item_counts, self.seed, self.name, round_index)
            bucket = order[turn]
            earlier_batches = round_index * len(self.buckets[bucket]) + order[:turn].count(bucket)
            epoch, item = self._find_item(bucket, earlier_batches * self.batch_size + offset)

        # Each epoch shows the next crop of a photo.
        crop_count = self.encoder.rule.crops_per_photo
        crop_index = epoch if crop_count is None else epoch % crop_count
        if crop_size is None:
            crop_size = self._get_crop_size(item)
        return item, crop_index, crop_size

    def _find_item(self, bucket: BucketSize, index: int) -> tuple[int, int]:
        """Return (epoch, item) at an index into a bucket, or into all items if it has none."""
        items = self.buckets[bucket] or range(len(self))
        epoch, offset = shuffle_index(index, len(items), self.seed, self.name, bucket)
        return epoch, items[offset]

    def list_crops(self, sample_count: int) -> list[tuple[photo_file.Photo, augment.CropPlan]]:
        """Return the different crops of the first `sample_count` samples; none where each epoch
        crops anew."""
        if not self.encoder.rule.crops_per_photo:
            return []
        first_index: dict[CropKey, int] = {}
        for index in range(sample_count):
            first_index.setdefault(self._find_crop(index), index)
        return [self._plan_crop(index) for index in first_index.values()]


@lru_cache(maxsize=64)
def shuffle_batches(counts: tuple[tuple[object, int], ...], *seeds: object) -> tuple[object, ...]:
    """Return each bucket as often as its count, shuffled by the seeds."""
    buckets = [bucket for bucket, count in counts for _ in range(count)]
    return tuple(seed_rng("batches", *seeds).sample(buckets, len(buckets)))


@dataclass(frozen=True)
class SubjectsDataset(Dataset):
    """Map-style dataset of several subjects, which takes turns between their datasets.

    datasets: one for each subject
    seed: of the order
    run_length: consecutive samples of the same subject
    """

    datasets: Sequence[PhotoDataset]
    seed: int
    run_length: int = 1

    @property
    def captions(self) -> set[str]:
        return set().union(*(dataset.captions for dataset in self.datasets))

    @property
    def encoder(self) -> PhotoEncoder:
        """The encoder that all datasets share."""
        return self.datasets[0].encoder

    def __getitem__(self, index: int) -> tuple[EncodedCrop, str]:
        """Return a crop and its caption."""
        subject, subject_index = self._find_sample(index)
        return self.datasets[subject][subject_index]

    def get_subject(self, index: int) -> int:
        """Return the number of the subject that a sample shows."""
        return self._find_sample(index)[0]

    def _find_sample(self, index: int) -> tuple[int, int]:
        """Return (number of the subject, index into its dataset)."""
        turn, offset = divmod(index, self.run_length)
        round_index, subject = shuffle_index(turn, len(self.datasets), self.seed, "subjects")
        return subject, round_index * self.run_length + offset

    def list_crops(self, sample_count: int) -> list[tuple[photo_file.Photo, augment.CropPlan]]:
        """Return the different crops of the first `sample_count` samples, in whole rounds."""
        round_count = math.ceil(sample_count / (len(self.datasets) * self.run_length))
        subject_samples = round_count * self.run_length
        return [crop for dataset in self.datasets for crop in dataset.list_crops(subject_samples)]


def build_instance_dataset(
    config: train_config.TrainConfig, photos: list[photo_file.Photo], encoder: PhotoEncoder
) -> SubjectsDataset:
    """Build the dataset of the subjects' photos. With buckets a batch shows one subject."""
    datasets = []
    for number, subject in enumerate(config.each_subject):
        subject_photos = []
        for photo in photos:
            if photo.subject == number:
                captions = caption_variants.shuffle_captions(subject, photo.captions)
                subject_photos.append(replace(photo, captions=captions))
        dataset = PhotoDataset(
            photos=subject_photos,
            encoder=encoder,
            seed=config.seed,
            name=subjects.get_seed_name("instance", number),
            repeats=config.repeats,
            caption_dropout=config.caption_dropout,
            batch_size=config.train_batch_size,
            bare_prompt_share=subject.bare_prompt_share,
        )
        datasets.append(dataset)

    # With buckets, a batch has one size, and so one subject.
    run_length = config.train_batch_size if config.has_buckets else 1
    return SubjectsDataset(datasets, seed=config.seed, run_length=run_length)


def build_prior_dataset(
    config: train_config.TrainConfig,
    class_photos: list[list[photo_file.Photo]],
    encoder: PhotoEncoder,
    instance: SubjectsDataset,
) -> SubjectsDataset:
    """Build the dataset of class images, whose sample at an index belongs to the instance sample
    there: it is of its class and, with buckets, of its size."""
    datasets = []
    for number, (photos, partner) in enumerate(zip(class_photos, instance.datasets, strict=True)):
        dataset = PhotoDataset(
            photos=photos,
            encoder=encoder,
            seed=config.seed,
            name=subjects.get_seed_name("prior", number),
            size_source=partner if config.has_buckets else None,
        )
        datasets.append(dataset)
    return SubjectsDataset(datasets, seed=config.seed, run_length=instance.run_length)


@dataclass(frozen=True)
class TrainBatch:
    """Batch of B samples, on the CPU.

    latents: (B, C, h, w)
    photo_inputs: further inputs of the denoiser by name, each (B, …)
    instance_count: how many show the subject; these come first, then class images
    mask: (B, 1, h, w) loss weights in [0, 1]; None without masks
    prompts: (B)
    """

    latents: torch.Tensor
    photo_inputs: dict[str, torch.Tensor]
    instance_count: int
    mask: torch.Tensor | None
    prompts: list[str]

    def add_base_prior(self, prompts: list[str]) -> "TrainBatch":
        """Return the batch twice (2B): the second half has these prompts (B), and its target will
        be the base's own prediction."""
        mask = None
        if self.mask is not None:
            mask = torch.cat([self.mask, torch.ones_like(self.mask)])
        photo_inputs = {name: torch.cat([x, x]) for name, x in self.photo_inputs.items()}
        return TrainBatch(
            latents=torch.cat([self.latents, self.latents]),
            photo_inputs=photo_inputs,
            instance_count=len(self.prompts),
            mask=mask,
            prompts=[*self.prompts, *prompts],
        )


@dataclass(frozen=True)
class TrainDataLoader:
    """Data loader of photos and class images. Batches can be loaded in any order.

    instance: dataset of the subjects' photos
    prior: dataset of class images; None without any
    """

    instance: SubjectsDataset
    prior: SubjectsDataset | None = None

    @property
    def datasets(self) -> list[SubjectsDataset]:
        return [self.instance] if self.prior is None else [self.instance, self.prior]

    def load_batch(self, indices: Sequence[int]) -> TrainBatch:
        """Load the instance samples at these indices, and the class images that belong to them."""
        samples = [dataset[index] for dataset in self.datasets for index in indices]
        return collate(samples, instance_count=len(indices))


def build_dataloader(
    config: train_config.TrainConfig,
    photos: list[photo_file.Photo],
    class_photos: list[list[photo_file.Photo]],
    encoder: PhotoEncoder,
) -> TrainDataLoader:
    """Build the datasets of a run and their data loader.

    config: the run's settings
    photos: of all subjects
    class_photos: class images of each subject; empty without class images
    encoder: crops and encodes both alike
    """
    instance = build_instance_dataset(config, photos, encoder)
    prior = None
    if class_photos:
        prior = build_prior_dataset(config, class_photos, encoder, instance)
    return TrainDataLoader(instance, prior)


def collate(samples: Sequence[tuple[EncodedCrop, str]], instance_count: int) -> TrainBatch:
    """Collate samples, the instance samples first. Where only some have a mask, the others get a
    mask of ones. Raises ValueError if samples have different inputs."""
    crops = [crop for crop, _ in samples]
    mask = None
    if any(crop.mask is not None for crop in crops):
        whole_mask = torch.ones_like(crops[0].latents[:1])
        mask = torch.stack([whole_mask if crop.mask is None else crop.mask for crop in crops])
    inputs = [crop.photo_inputs for crop in crops]
    if any(row.keys() != inputs[0].keys() for row in inputs):
        raise ValueError(
            f"photos of a batch need the same inputs: {[sorted(row) for row in inputs]}"
        )
    return TrainBatch(
        latents=torch.stack([crop.latents for crop in crops]),
        photo_inputs={name: torch.stack([row[name] for row in inputs]) for name in inputs[0]},
        instance_count=instance_count,
        mask=mask,
        prompts=[caption for _, caption in samples],
    )


def move_tensors(
    tensors: dict[str, torch.Tensor | None], device: torch.device
) -> dict[str, torch.Tensor | None]:
    """Move CPU tensors without gradients to `device` by one transfer in fp32; it is asynchronous on
    CUDA (from pinned memory). All else stays as it is."""
    if device.type == "cpu":
        return tensors

    # All in one buffer: many small transfers would each wait for the device.
    moving = {}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device.type == "cpu" and not tensor.requires_grad:
            moving[name] = tensor
    buffer = torch.cat([tensor.reshape(-1).float() for tensor in moving.values()])
    is_cuda = device.type == "cuda"
    if is_cuda:
        buffer = buffer.pin_memory()
    buffer = buffer.to(device, non_blocking=is_cuda)

    # Each gets its part, in its own shape and dtype.
    parts = buffer.split([tensor.numel() for tensor in moving.values()])
    return tensors | {
        name: part.view(tensor.shape).to(tensor.dtype)
        for part, (name, tensor) in zip(parts, moving.items(), strict=True)
    }
