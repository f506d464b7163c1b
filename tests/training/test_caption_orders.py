"""Captions that vary: prefix and suffix, tags in changing orders, empty ones, and the instance prompt in a share of the
exposures; by seed and position alone."""

from collections import Counter

import pytest

from dreambooth_moslora.photos.folder import ORDERS, bare_prompt_line, photo_report, shuffled_captions
from dreambooth_moslora.photos.photo import Photo
from dreambooth_moslora.settings.sources import recipe_of
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.photo_stream import PhotoStream
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


def stream(captions, dropout=0.0, name="instance", bare_prompt=None, share=0.0):
    photos = [Photo(name, (64, 64), captions, bare_prompt=bare_prompt) for name in ("a.png", "b.png")]
    return PhotoStream(photos, Nothing(), 3, name, 1, dropout, bare_share=share)


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


PLACED, BARE = ("a photo of sks dog on grass", "a photo of sks dog in snow"), "a photo of sks dog"


def photos_with(folder, *captions, **changes):
    """Painted photos, each with one of these texts beside it, as a run reads them."""
    photos = paint_photos(folder, count=len(captions))
    for number, text in enumerate(captions):
        (photos / f"{number}.txt").write_text(text)
    return photo_report(config(instance_data_dir=str(photos), resolution=64, **changes)).photos


def test_the_bare_prompt_is_of_photos_whose_captions_lack_it(tmp_path):
    texts = (PLACED[0], f"{PLACED[0]}\n{BARE}", "A photo  of SKS dog.", "")
    found = photos_with(tmp_path, *texts, caption_prefix="look:")
    assert [photo.bare_prompt for photo in found] == [BARE, None, BARE, None]  # a prefix makes it another prompt
    assert photos_with(tmp_path, *texts)[2].bare_prompt is None


@pytest.mark.parametrize("share", [0.0, 0.25, 1 / 3, 1.0])
def test_a_share_of_exposures_has_the_bare_prompt_at_the_same_places_each_time(share):
    bare = stream(PLACED, bare_prompt=BARE, share=share)
    texts = said(bare, 600)
    assert texts.count(BARE) == pytest.approx(600 * share, abs=45 if 0 < share < 1 else 0)
    assert [bare.at(position)[1] for position in reversed(range(600))] == texts[::-1]
    others = [pair for pair in zip(texts, said(stream(PLACED), 600)) if pair[0] != BARE]
    assert all(with_share == without for with_share, without in others)
    assert bare.captions == ({*PLACED, BARE} if share else {*PLACED})


def test_a_caption_that_is_left_out_is_not_replaced_by_the_bare_prompt():
    texts = said(stream(PLACED, dropout=0.5, bare_prompt=BARE, share=0.5), 600)
    assert texts.count("") == said(stream(PLACED, dropout=0.5), 600).count("") and texts.count(BARE) < 200


def test_photos_with_the_bare_prompt_among_their_captions_keep_every_draw():
    assert said(stream((*PLACED, BARE), share=1.0)) == said(stream((*PLACED, BARE)))


def test_a_data_sets_captions_are_used_as_they_are_unless_a_share_is_given():
    column = {"dataset_name": "dogs", "caption_column": "text"}
    assert config().bare_share == pytest.approx(1 / 3) and config(**column).bare_share == 0
    assert (
        config(**column, instance_prompt_share=0.2).bare_share == 0.2
        and config(instance_prompt_share=0).bare_share == 0
    )


def test_a_file_tells_the_share_only_if_it_was_given():
    assert "instance_prompt_share" not in recipe_of(config())
    assert recipe_of(config(instance_prompt_share=0))["instance_prompt_share"] == 0


def test_one_line_says_what_the_captions_lack(tmp_path):
    photos = photos_with(tmp_path, PLACED[0], BARE)
    line = "captions: 1 of 2 photos have none that is the instance prompt itself; "
    assert bare_prompt_line(config(), photos) == f"{line}33% of their exposures show it (--instance_prompt_share)"
    never = bare_prompt_line(config(instance_prompt_share=0), photos)
    assert never == f"{line}they are never shown with it (--instance_prompt_share)"
    assert bare_prompt_line(config(), photos[1:]) is None
