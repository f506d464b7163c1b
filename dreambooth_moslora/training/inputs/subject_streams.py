"""Merges the streams of several subjects; each subject is shown equally often, whatever its number of photos.

    position p  ->  round p div k, subject (order drawn anew each round)  ->  that subject's stream at the round

The position alone determines the sample: resumed or distributed runs show what an unbroken run of one process
shows.
"""

from collections.abc import Sequence
from dataclasses import replace

from dreambooth_moslora.core.config.subject_tables import each_subject, stream_of
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.seeding import place_of
from dreambooth_moslora.photos.crops import CropPlan
from dreambooth_moslora.photos.photo import Photo
from dreambooth_moslora.training.inputs.caption_orders import shuffled_captions
from dreambooth_moslora.training.inputs.photo_encoder import EncodedView, PhotoEncoder
from dreambooth_moslora.training.inputs.photo_stream import PhotoStream

__all__ = ["SubjectStreams", "instance_streams", "prior_streams"]


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
        """Like `PhotoStream.views_ahead`, of all subjects."""
        return [view for stream in self.streams for view in stream.views_ahead(self._share(sample_count))]

    def _share(self, sample_count: int) -> int:
        """Samples of each stream in `sample_count`, rounded up to whole rounds."""
        in_a_round = len(self.streams) * self.run
        return -(-sample_count // in_a_round) * self.run if len(self.streams) > 1 else sample_count


def instance_streams(config: TrainConfig, photos: list[Photo], encoder: PhotoEncoder) -> SubjectStreams:
    """The streams of the subjects' photos. With buckets, a batch shows one subject, as it needs one size."""
    streams = []
    for number, subject in enumerate(each_subject(config)):
        own = taking_turns([photo for photo in photos if photo.subject == number], config)
        shuffled = [replace(photo, captions=shuffled_captions(subject, photo.captions)) for photo in own]
        varied = (config.repeats, config.caption_dropout, config.train_batch_size)
        name, share = stream_of("instance", number), subject.bare_share
        streams.append(PhotoStream(shuffled, encoder, config.seed, name, *varied, bare_share=share))
    return SubjectStreams(streams, config.seed, config.train_batch_size if config.enable_bucket else 1)


def taking_turns(photos: list[Photo], config: TrainConfig) -> list[Photo]:
    """When photos are left out by name, the other photos take their turns, each equally often.

    Runs without different photos then differ only in those turns: order, crops and noise of all other turns are
    the same. It applies to one subject, since a name does not tell whose photo it is.
    """
    if not config.leave_out or config.subjects:
        return photos
    named = {photo.path.name: [photo] * len(photos) for photo in photos} | dict.fromkeys(config.leave_out, photos)
    return [photo for name in sorted(named) for photo in named[name]]


def prior_streams(
    config: TrainConfig, class_photos: list[list[Photo]], encoder: PhotoEncoder, instance: SubjectStreams
) -> SubjectStreams:
    """The streams of class images. Beside each sample of a subject they show one of its class; with buckets, of
    the same size."""
    streams = []
    for number, (photos, own) in enumerate(zip(class_photos, instance.streams, strict=True)):
        beside = own if config.enable_bucket else None
        streams.append(PhotoStream(photos, encoder, config.seed, stream_of("prior", number), beside=beside))
    return SubjectStreams(streams, config.seed, instance.run)
