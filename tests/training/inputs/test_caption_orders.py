"""Captions that vary: prefix and suffix, tags in changing orders, and empty ones; by seed and position alone."""

from collections import Counter

import pytest

from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.photos.folder import photo_report
from dreambooth_moslora.photos.photo import Photo
from dreambooth_moslora.training.inputs.caption_orders import ORDERS, shuffled_captions
from dreambooth_moslora.training.inputs.photo_stream import PhotoStream
from dreambooth_moslora.training.planning.advice import settings_without_effect
from tests.helpers.tiny_training import paint_photos

TAGS = "sks dog, red collar, on grass, side view"


def config(**changes):
    return TrainConfig(**{"seed": 3, "instance_prompt": "a photo of sks dog"} | changes)


class Nothing:
    """An encoder whose pictures nobody looks at."""

    class rule:  # noqa: N801
        crops_per_photo = 1

        @staticmethod
        def target(size_px):
            return size_px

        @staticmethod
        def plan(size_px, draws, target):
            return None

    def encode(self, photo, plan):
        return photo


def stream(captions, dropout=0.0, name="instance"):
    photos = [Photo(name, (64, 64), captions) for name in ("a.png", "b.png")]
    return PhotoStream(photos, Nothing(), 3, name, 1, dropout)


def said(stream, count=200):
    return [stream.at(position)[1] for position in range(count)]


def test_prefix_and_suffix_stand_around_a_photos_own_captions(tmp_path):
    photos = paint_photos(tmp_path, count=2)
    (photos / "0.txt").write_text("on grass\nin snow\n")
    framed = photo_report(
        config(instance_data_dir=str(photos), resolution=64, caption_prefix="sks dog,", caption_suffix=", photo")
    )
    assert framed.photos[0].captions == ("sks dog, on grass, photo", "sks dog, in snow, photo")
    assert framed.photos[1].captions == ("a photo of sks dog",)


def test_tags_change_places_and_the_kept_ones_stay():
    found = shuffled_captions(config(shuffle_caption=True, keep_tokens=1), (TAGS,))
    assert len(found) == ORDERS and found[0] == TAGS and len(set(found)) > 3
    assert all(caption.startswith("sks dog, ") for caption in found)
    assert {tuple(sorted(caption.split(", "))) for caption in found} == {tuple(sorted(TAGS.split(", ")))}
    moved = shuffled_captions(config(shuffle_caption=True), (TAGS,))
    assert not all(caption.startswith("sks dog") for caption in moved)
    assert shuffled_captions(config(), (TAGS,)) == (TAGS,)


def test_prefix_and_suffix_stay_whatever_is_shuffled():
    ends = {"caption_prefix": "sks dog,", "caption_suffix": ", in the style of a photo"}
    framed = "sks dog, red, blue, green, in the style of a photo"
    found = shuffled_captions(config(shuffle_caption=True, **ends), (framed, "sks dog,"))
    assert found[0] == framed and len(set(found[:ORDERS])) > 3 and set(found[ORDERS:]) == {"sks dog,"}
    assert all(c.startswith("sks dog, ") and c.endswith(", in the style of a photo") for c in found[:ORDERS])


def test_an_instance_prompt_has_no_prefix_that_could_be_taken_from_it():
    prompt = {"instance_prompt": "sks dog", "caption_prefix": "sks dog", "caption_suffix": "sks dog"}
    assert set(shuffled_captions(config(shuffle_caption=True, **prompt), ("sks dog",))) == {"sks dog"}


def test_a_prefix_with_a_space_before_its_comma_stays_in_front(tmp_path):
    photos = paint_photos(tmp_path, count=1)
    (photos / "0.txt").write_text("red, blue, green\n")
    spaced = config(instance_data_dir=str(photos), resolution=64, shuffle_caption=True, caption_prefix="sks dog ,")
    (photo,) = photo_report(spaced).photos
    assert all(caption.startswith("sks dog, ") for caption in shuffled_captions(spaced, photo.captions))


def test_orders_are_named_by_the_seed():
    orders = [shuffled_captions(config(shuffle_caption=True, seed=seed), (TAGS,)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_each_caption_is_drawn_as_often_as_without_shuffling():
    short, many = "sks dog", shuffled_captions(config(shuffle_caption=True), (TAGS, "sks dog"))
    assert Counter(said(stream(many)))[short] == pytest.approx(100, abs=40)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_exposures_has_no_caption_at_the_same_places_each_time(share):
    texts = said(stream((TAGS,), share))
    assert texts.count("") == pytest.approx(200 * share, abs=30 if 0 < share < 1 else 0)
    again = stream((TAGS,), share)
    assert [again.at(position)[1] for position in reversed(range(200))] == texts[::-1]


def test_what_cannot_be_is_one_line():
    with pytest.raises(UserError, match=r"--caption_dropout 1.5: must be at most 1"):
        config(caption_dropout=1.5)
    assert "--keep_tokens has no effect without --shuffle_caption" in settings_without_effect(config(keep_tokens=1))
