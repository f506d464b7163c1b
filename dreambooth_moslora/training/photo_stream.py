"""The endless, shuffled, seeded stream of batches of photos and captions, of one subject or of several.

    sample at position p  ->  (photo, repeat, crop)  ->  EncodedView  ->  TrainBatch

Each epoch shuffles photos × repeats. The crop number is epoch mod `crops_per_photo`; without a cache every
epoch has fresh crops. Every image, class images too, carries its own size and crop conditioning.

Each of several subjects is shown equally often, whatever its number of photos.

    position p  ->  round p div k, subject (order drawn anew each round)  ->  that subject's stream at the round

The position alone determines the sample: resumed or distributed runs show what an unbroken run of one process
shows.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from dreambooth_moslora.core import place_of, rng
from dreambooth_moslora.photos.folder import shuffled_captions
from dreambooth_moslora.photos.photo import CropPlan, Photo, nearest_shape
from dreambooth_moslora.settings.subjects import each_subject, stream_of
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.encoder import EncodedView, PhotoEncoder

Size = tuple[int, int]
"""(h, w) in px."""
View = tuple[int, int, Size]
"""(slot, crop number, crop size); the slot numbers photos times repeats."""


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
        bare_share: float = 0.0,
    ):
        """Crops have one size in each group of `batch_size` positions, or that of a stream `beside` at the place."""
        self.photos, self.encoder, self.seed, self.name, self.repeats = photos, encoder, seed, name, repeats
        self.caption_dropout, self.batch_size, self.beside = caption_dropout, batch_size, beside
        self.bare_share = bare_share
        self.groups: dict[Size, list[int]] = {size: [] for size in beside.groups} if beside else {}
        for slot in range(len(self)):
            size_px = photos[slot // repeats].size_px
            target = nearest_shape(size_px, beside.groups) if beside else encoder.rule.target(size_px)
            self.groups.setdefault(target, []).append(slot)

    def __len__(self) -> int:
        """Samples per epoch."""
        return len(self.photos) * self.repeats

    def at(self, position: int) -> tuple[EncodedView, str]:
        """The encoded view at `position` >= 0, and a random caption of its photo. A fraction `caption_dropout` has an
        empty caption; of the others, `bare_share` has the photo's bare prompt, if any."""
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

    def read_ahead(self, position: int) -> None:
        """Start reading a sample that `at` will need soon."""
        self.encoder.read_ahead(*self._sample(position))

    def _sample(self, position: int) -> tuple[Photo, CropPlan]:
        slot, crop, target = self._view(position)
        photo, draws = self.photos[slot // self.repeats], rng(self.seed, self.name, "crop", slot, crop)
        return photo, self.encoder.rule.plan(photo.size_px, draws, target)

    @property
    def is_one_size(self) -> bool:
        """Whether any samples can be batched together."""
        return len(self.groups) == 1 or self.batch_size == 1

    def _view(self, position: int) -> View:
        """Where batches need one size, a round has as many batches as slots, and each group has as many batches as it
        has slots. So each slot is shown `batch_size` times a round, whatever the size of its group."""
        target = None
        if self.beside is not None:
            target = self.beside._view(position)[2]
            epoch, slot = self._place_in(target, position)
        elif self.is_one_size:
            epoch, slot = place_of(position, len(self), self.seed, self.name)
        else:
            batch, place = divmod(position, self.batch_size)
            turn, number = divmod(batch, len(self))
            counts = tuple((key, len(slots)) for key, slots in self.groups.items())
            order = batch_order(counts, self.seed, self.name, turn)
            key = order[number]
            batches_before = turn * len(self.groups[key]) + order[:number].count(key)
            epoch, slot = self._place_in(key, batches_before * self.batch_size + place)
        crops = self.encoder.rule.crops_per_photo
        target = target or self.encoder.rule.target(self.photos[slot // self.repeats].size_px)
        return slot, epoch if crops is None else epoch % crops, target

    def _place_in(self, size: Size, position: int) -> tuple[int, int]:
        """(epoch, slot) among the slots of this size, or among all if there are none."""
        slots = self.groups[size] or range(len(self))
        epoch, found = place_of(position, len(slots), self.seed, self.name, size)
        return epoch, slots[found]

    def views_ahead(self, sample_count: int) -> list[tuple[Photo, CropPlan]]:
        """The different views among the first `sample_count` samples; none when each epoch crops anew."""
        crops = self.encoder.rule.crops_per_photo or 0
        turns = crops if self.is_one_size else self.batch_size * math.ceil(crops / self.batch_size)
        bound = len(self) * turns if self.beside is None else sample_count * (crops > 0)
        first: dict[View, int] = {}
        for position in range(min(sample_count, bound)):
            first.setdefault(self._view(position), position)
        return [self._sample(position) for position in first.values()]


@lru_cache(maxsize=64)
def batch_order(groups: tuple[tuple[object, int], ...], *names: object) -> tuple[object, ...]:
    """The groups' keys, each as often as its count, shuffled."""
    keys = [key for key, count in groups for _ in range(count)]
    return tuple(rng("batches", *names).sample(keys, len(keys)))


class SubjectStreams:
    """Takes turns between one stream per subject. `run` samples in a row show the same subject."""

    def __init__(self, streams: Sequence[PhotoStream], seed: int, run: int = 1):
        self.streams, self.seed, self.run = streams, seed, run

    @property
    def photos(self) -> list[Photo]:
        return [photo for stream in self.streams for photo in stream.photos]

    @property
    def captions(self) -> set[str]:
        """Like `PhotoStream.captions`, of all subjects."""
        return set().union(*(stream.captions for stream in self.streams))

    @property
    def encoder(self) -> PhotoEncoder:
        """The one that all streams share."""
        return self.streams[0].encoder

    def subject_at(self, position: int) -> int:
        """The number of the subject shown at `position`."""
        return self._place(position)[0]

    def at(self, position: int) -> tuple[EncodedView, str]:
        """Like `PhotoStream.at`."""
        number, place = self._place(position)
        return self.streams[number].at(place)

    def read_ahead(self, position: int) -> None:
        number, place = self._place(position)
        self.streams[number].read_ahead(place)

    def _place(self, position: int) -> tuple[int, int]:
        """(number of the stream, position in it)."""
        turn, offset = divmod(position, self.run)
        round_, number = place_of(turn, len(self.streams), self.seed, "subjects")
        return number, round_ * self.run + offset

    def views_ahead(self, sample_count: int) -> list[tuple[Photo, CropPlan]]:
        """Like `PhotoStream.views_ahead`, of all subjects: in whole rounds if there are several."""
        share = sample_count
        if len(self.streams) > 1:
            share = -(-sample_count // (len(self.streams) * self.run)) * self.run
        return [view for stream in self.streams for view in stream.views_ahead(share)]


def instance_streams(config: TrainConfig, photos: list[Photo], encoder: PhotoEncoder) -> SubjectStreams:
    """The streams of the subjects' photos. With buckets, a batch shows one subject, as it needs one size. When photos
    of one subject are left out by name, the other photos take their turns, each equally often. Runs without different
    photos then differ only in those turns: order, crops and noise of all other turns are the same."""
    if config.leave_out and not config.subjects:  # of several, a name does not tell whose photo it is
        named = {photo.path.name: [photo] * len(photos) for photo in photos} | dict.fromkeys(config.leave_out, photos)
        photos = [photo for name in sorted(named) for photo in named[name]]
    streams = []
    for number, subject in enumerate(each_subject(config)):
        own = [photo for photo in photos if photo.subject == number]
        shuffled = [replace(photo, captions=shuffled_captions(subject, photo.captions)) for photo in own]
        varied = (config.repeats, config.caption_dropout, config.train_batch_size)
        name, share = stream_of("instance", number), subject.bare_share
        streams.append(PhotoStream(shuffled, encoder, config.seed, name, *varied, bare_share=share))
    return SubjectStreams(streams, config.seed, config.train_batch_size if config.enable_bucket else 1)


def prior_streams(
    config: TrainConfig, class_photos: list[list[Photo]], encoder: PhotoEncoder, instance: SubjectStreams
) -> SubjectStreams:
    """The streams of class images: beside each sample one of its class; with buckets, of the same size."""
    streams = []
    for number, (photos, own) in enumerate(zip(class_photos, instance.streams, strict=True)):
        beside = own if config.enable_bucket else None
        streams.append(PhotoStream(photos, encoder, config.seed, stream_of("prior", number), beside=beside))
    return SubjectStreams(streams, config.seed, instance.run)
