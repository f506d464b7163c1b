"""Measures of vectors with answers known by hand, and of the toy world, whose truth is known;
encoders."""

import math
import random
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageFilter
from torch.nn.functional import normalize

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.evaluation import metrics
from tests.helpers.tiers import slow_but
from tests.helpers.tiny_encoders import save_tiny_encoders
from toybox.make_subjects import FOLDER, load
from toybox.render import render
from toybox.truth import sample_other_toy
from toybox.world import Scene, Toy, sample_scene

E = torch.eye(4)
HALF, ASIDE = normalize(E[0] + E[1], dim=0), normalize(E[0] + E[2], dim=0)
"""Vectors at 45 degrees between two axes."""
TEXTS = ["a dog", "a photo of a very small dog on a wide beach, at night", "cat " * 60]


def sample_units(n: int, seed: int = 0, dim: int = 32) -> torch.Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def perturb(vectors: torch.Tensor, size: float, seed: int) -> torch.Tensor:
    """Return the vectors, each moved a little."""
    return normalize(vectors + size * sample_units(len(vectors), seed, vectors.shape[1]), dim=-1)


PHOTOS = [E[0], HALF]
KNOWN = {
    "the mean cosine to all photos": (
        "subject_fidelity",
        ([E[0], HALF, E[2]], E[:2]),
        [0.5, math.sqrt(0.5), 0.0],
    ),
    "0 for equal pictures": ("drift", ([HALF, E[0]], [HALF, E[1]]), [0, 1]),
    "1 at a photo, 0 at the photos' own nearness": (
        "compute_copy_index",
        ([E[0], ASIDE], PHOTOS),
        [1, 0],
    ),
    "gained": ("compute_background_leak", ([E[0], E[2]], [E[2], E[2]], E[:1]), [1, 0]),
}


@pytest.mark.parametrize("name", KNOWN)
def test_measures_of_known_vectors(name):
    measure, vectors, expected = KNOWN[name]
    values = getattr(metrics, measure)(*(torch.stack([*rows]) for rows in vectors))
    assert values.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "likeness"),
    [
        ((0.3, 0.6, 1.0, 1.0), 0.5),  # half as like as the photos are to each other
        ((0.9, 0.6, 1.0, 1.0), 1.0),
        ((0.6, 0.6, 0.4, 0.8), 0.5),  # half of the faces that the base shows
        ((0.6, 0.6, 0.9, 0.8), 1.0),
        ((-0.1, 0.6, 1.0, 1.0), 0.0),
        ((0.3, 0.6, 1.0, 0.0), 0.5),
    ],
)
def test_face_likeness_is_a_share_of_the_photos_own(values, likeness):
    assert metrics.compute_face_likeness(*values) == pytest.approx(likeness)


def test_photo_fidelity_and_joint_vectors():
    assert metrics.photo_fidelity(torch.stack([E[0], E[0], E[1]])) == pytest.approx(1 / 3)
    assert math.isnan(metrics.photo_fidelity(E[:1]))
    similarities = metrics.compute_mutual_similarity(torch.stack([E[0], E[0], E[1]]))
    assert similarities.tolist() == pytest.approx([1 / 2, 1 / 2, 0])
    clip, dino = sample_units(3, 0), sample_units(3, 1, dim=16)
    joint = metrics.join_embeddings(clip, dino)
    assert torch.allclose(joint @ joint.T, (clip @ clip.T + dino @ dino.T) / 2, atol=1e-6)


def test_prompt_fidelity_is_paired_and_diversity_is_by_prompt():
    texts = sample_units(8)
    vectors = perturb(texts, 0.5, seed=1)
    paired = metrics.prompt_fidelity(vectors, texts)
    assert paired.tolist() == pytest.approx([float(p @ t) for p, t in zip(vectors, texts)])
    assert metrics.prompt_fidelity(vectors, texts.roll(1, 0)).mean() < paired.mean()
    vectors = torch.stack([E[0], E[1], HALF, E[2], E[2], E[2]])
    expected = (1 + 2 * (1 - math.sqrt(0.5))) / 3
    assert metrics.diversity(vectors, 3) == pytest.approx(np.array([[expected], [0]]))


def test_the_copy_alarm_is_for_copies_and_names_the_photo():
    """Check also that equal photos and a single one do not divide by zero."""
    subject = sample_units(1, 5)
    photos = perturb(subject.repeat(5, 1), 0.6, seed=6)
    fresh, copies = perturb(subject.repeat(20, 1), 0.6, seed=7), perturb(photos, 0.05, seed=8)
    assert not metrics.detect_copies(fresh, photos).raised
    mixed = metrics.detect_copies(torch.cat([fresh, copies]), photos)
    assert mixed.raised and mixed.share == pytest.approx(5 / 25)
    # the worst picture is a copy of the photo that it names
    assert mixed.picture == 20 + mixed.photo
    for photos in (E[:1].repeat(3, 1), E[:1]):
        assert metrics.compute_copy_index(E[:1], photos).tolist() == pytest.approx([1.0], abs=1e-5)


def test_a_style_share_goes_from_the_base_to_the_photos():
    """The base's cosines to the photos are 0.2 and 0.4, then 0.2 alone. Those of the photos to
    each other are 1, then 1/2, 1/2 and 0."""
    photos = E[[0, 0]]
    base = torch.stack([make_leaning(0.2), make_leaning(0.4)])
    shares = metrics.compute_style_share(
        torch.stack([*base, make_leaning(0.65), E[0]]), base, photos
    )
    assert shares.tolist() == pytest.approx([-1 / 7, 1 / 7, 0.5, 1.0])
    lone = metrics.compute_style_share(E[:1], make_leaning(0.5)[None], E[:1])
    assert lone.tolist() == [1.0]
    assert metrics.compute_style_share(E[:1], make_leaning(0.3)[None], E[[0, 0, 1]]) is None
    assert metrics.compute_style_share(E[:1], E[:1], E[[0, 0]]) is None


def make_leaning(cosine: float) -> torch.Tensor:
    """Return a unit vector with this cosine to the first axis, and 0 to the second."""
    return cosine * E[0] + math.sqrt(1 - cosine**2) * E[2]


def test_the_score_is_a_product_with_bounded_prompt_fidelity():
    for scores, expected in (
        ((0.8, 0.3, 0.3, 0.0), 0.8),
        ((0.8, 0.6, 0.3, 0.0), 0.8),
        ((-0.2, 0.3, 0.3, 0.0), 0.0),
    ):
        assert metrics.compute_checkpoint_score(*scores) == pytest.approx(expected)
    assert metrics.compute_checkpoint_score(0.8, 0.15, 0.3, 0.25) == pytest.approx(0.8 * 0.5 * 0.75)


@pytest.mark.parametrize("shape", [(6, 1), (6, 2), (12, 10), (16, 4), (3, 2)])
def test_intervals_have_about_their_nominal_coverage(shape):
    rng, (rows, columns) = np.random.default_rng(0), shape
    hits = 0
    for trial in range(400):
        table = (
            rng.normal(0, 1, (rows, 1))
            + rng.normal(0, 0.5, (1, columns)) * (columns > 1)
            + rng.normal(0, 1, shape)
        )
        interval = metrics.bootstrap_mean(table, resamples=400, seed=trial)
        hits += interval.low <= 0 <= interval.high
    assert 0.93 <= hits / 400 <= 0.999


def test_students_table_has_tails_of_a_fortieth():
    """Integrate the density: with t = √ν·tan θ it is proportional to cos(θ)^(ν-1)."""
    angles = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    for degrees, point in zip(metrics.T_DEGREES[:-1], metrics.T_QUANTILES[:-1], strict=True):
        density = np.cos((angles[1:] + angles[:-1]) / 2) ** (degrees - 1)
        tail = density[angles[1:] > np.arctan(point / np.sqrt(degrees))].sum() / density.sum()
        assert tail == pytest.approx(0.025, rel=2e-3)
    assert [metrics.compute_t_quantile(n) for n in (1, 5, 30, np.inf)] == pytest.approx(
        [12.706, 2.571, 2.042, 1.960]
    )
    assert (
        2.201 <= metrics.compute_t_quantile(11) < 2.22
        and 2.093 <= metrics.compute_t_quantile(19) < 2.11
    )


def test_crossed_bootstrap_is_wider_than_independent_images():
    """Check also that one value has no interval, and that gaps are refused."""
    table = np.repeat(np.arange(6.0)[:, None], 50, axis=1)  # the prompt decides everything
    crossed, naive = metrics.bootstrap_mean(table), metrics.bootstrap_mean(table.ravel())
    assert crossed.mean == naive.mean == pytest.approx(2.5)
    assert crossed.high - crossed.low > 4 * (naive.high - naive.low)
    lone = metrics.bootstrap_mean(np.array([[0.3]]))
    assert (str(lone), lone.to_dict()) == (
        "0.300, no interval",
        {"mean": 0.3, "low": None, "high": None},
    )
    for bad in (np.array([]), np.array([1.0, np.nan])):
        with pytest.raises(ValueError, match="finite"):
            metrics.bootstrap_mean(bad)


NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
NEW_PLACES = (
    "on lava",
    "in the snow",
    "on the moon",
    "on a purple rug",
    "in the desert",
    "on water",
)


@pytest.fixture(scope="module")
def toy_encoders() -> metrics.Encoders:
    return metrics.load_encoders("toy")


def open_photos(name: str) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(Path(FOLDER / name).glob("*.jpg"))]


def render_scenes(scenes: list[Scene]) -> list[Image.Image]:
    return [Image.fromarray(picture.numpy()) for picture in render(scenes)]


def render_toys(toys: list[Toy], seed: int) -> list[Image.Image]:
    rng = random.Random(seed)
    return render_scenes(
        [sample_scene(rng, toy, place, held_out=None) for toy, place in zip(toys, NEW_PLACES)]
    )


@pytest.mark.parametrize("name", slow_but(("bear", "rocket", "train"), NAMES))
def test_a_toy_is_recognised_and_a_worn_photo_is_a_copy(toy_encoders, name):
    def embed_joint(images: list[Image.Image]) -> torch.Tensor:
        return metrics.join_embeddings(
            toy_encoders.embed_clip_images(images),
            toy_encoders.embed_dino_images(images),
        )

    def wear_out(photo: Image.Image) -> Image.Image:
        """Return the photo as a model that learnt it by heart would: small, soft and a little
        off."""
        photo.resize((128, 128)).filter(ImageFilter.GaussianBlur(1)).save(
            buffer := BytesIO(), "JPEG", quality=70
        )
        return Image.open(buffer).convert("RGB")

    toy, photos, rng = load(name).toy, open_photos(name), random.Random(2)
    photo_vectors = embed_joint(photos)
    assert not metrics.detect_copies(embed_joint(render_toys([toy] * 6, 3)), photo_vectors).raised
    assert (
        metrics.detect_copies(
            embed_joint([wear_out(photo) for photo in photos]), photo_vectors
        ).share
        > 0.5
    )
    photo_dino = toy_encoders.embed_dino_images(photos)
    same, other_toys = (
        metrics.subject_fidelity(
            toy_encoders.embed_dino_images(render_toys(toys, 1)), photo_dino
        ).mean()
        for toys in ([toy] * 6, [sample_other_toy(toy, rng) for _ in range(6)])
    )
    assert same > other_toys + 0.2


def make_pictures(sizes=((64, 48), (40, 90), (32, 32), (51, 51))) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Save encoders; DINO interpolates its positions for smaller crops, as DINOv2-base does."""
    clip, dino = save_tiny_encoders(tmp_path_factory.mktemp("encoders"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    transformers.Dinov2Model(
        transformers.Dinov2Config(image_size=72, patch_size=8, **sizes)
    ).save_pretrained(dino)
    return clip, dino


def test_encoders_agree_with_whole_models_at_any_batch_size(folders, by_folder):
    """Compare with CLIPModel's forward pass and DINO's class token, one image and text at a
    time."""
    clip = transformers.CLIPModel.from_pretrained(folders[0])
    dino = transformers.Dinov2Model.from_pretrained(folders[1])
    clip_processor = transformers.CLIPImageProcessor.from_pretrained(folders[0])
    dino_processor = transformers.AutoImageProcessor.from_pretrained(folders[1])
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folders[0])
    pixels, views = (
        [p(item, return_tensors="pt").pixel_values for item in make_pictures()]
        for p in (clip_processor, dino_processor)
    )
    token_ids = [
        tokenizer(t, truncation=True, max_length=77, return_tensors="pt").input_ids for t in TEXTS
    ]
    with torch.no_grad():
        images = torch.cat(
            [clip.eval()(pixel_values=x, input_ids=token_ids[0]).image_embeds for x in pixels]
        )
        texts = torch.cat(
            [clip(pixel_values=pixels[0], input_ids=w).text_embeds for w in token_ids]
        )
        tokens = torch.cat([dino.eval()(view).pooler_output for view in views])
    for batch_size in (1, 2, 4, by_folder.batch_size):
        item = replace(by_folder, batch_size=batch_size)
        vectors = (
            item.embed_clip_images(make_pictures()),
            item.embed_clip_texts(TEXTS),
            item.embed_dino_images(make_pictures()),
        )
        for ours, direct in zip(vectors, (images, texts, tokens), strict=True):
            assert (ours - normalize(direct.float(), dim=-1)).abs().max() < 1e-5


@pytest.fixture(scope="module")
def by_folder(folders) -> metrics.Encoders:
    return metrics.load_encoders(clip=folders[0], dino=folders[1])


@pytest.mark.slow
def test_a_wrong_or_missing_encoder_is_refused(folders, by_folder, tmp_path):
    assert by_folder.names == ("clip", "dino"), "names carry no path"
    for clip, dino, message in (
        (folders[1], folders[1], "is no CLIPModel: it has no "),
        (tmp_path / "nowhere", folders[1], "is not here and cannot be fetched"),
    ):
        with pytest.raises(UserError, match=message):
            metrics.load_encoders(clip=clip, dino=dino)
