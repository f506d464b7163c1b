"""Does a subject's rank among look-alikes tell more of its likeness than DINO's cosine does?

    python -m toybox.measures.look_alikes

Fine-grained personalization asks for the rank (arXiv 2512.19026): of a picture's cosines to the
subject's photos and to those of ten others of its kind, the share of pairs in which the photo is
nearer. Here the truth is known: each picture shows a toy that has none, some or all of its looks
from another toy of its kind, in any place and light. Spearman's correlation of the likeness with
the share of the looks that are right is printed for each sample subject, and the mean of all with
its interval.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dreambooth_moslora.disk.paths import get_assets_folder
from dreambooth_moslora.evaluation.metrics import (
    Encoders,
    bootstrap_mean,
    load_encoders,
    subject_fidelity,
)
from toybox.make_subjects import FOLDER, SUBJECTS, load
from toybox.render import render
from toybox.world import Scene, Toy, sample_scene, sample_toy

__all__ = ["Correlation", "main", "correlate_subject", "compute_rank", "compute_spearman"]

# What makes an individual of its kind
LOOKS = ("colour", "colour2", "pattern", "genes", "accessories")
LOOK_ALIKES = 10
VIEWS = 3  # of each
IMAGE_COUNT = 64  # of each subject
SIZE_PX = 128


@dataclass(frozen=True)
class Correlation:
    """Correlation of each measure with the truth, for one subject."""

    dino: float
    rank: float


def compute_rank(
    generated: torch.Tensor, photos: torch.Tensor, look_alikes: torch.Tensor
) -> torch.Tensor:
    """(N, D), photos (P, D), look-alikes (L, D) -> (N,): the share of the pairs of a photo and a
    look-alike in which the photo is nearer; 1 if all photos come first, 1/2 by chance."""
    nearer = (generated @ photos.T)[:, :, None] > (generated @ look_alikes.T)[:, None, :]
    return nearer.float().mean((1, 2))


def compute_spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the correlation of the ranks of two lists (N,); equal values share their mean
    rank."""
    return float(np.corrcoef(compute_mean_ranks(first), compute_mean_ranks(second))[0, 1])


def compute_mean_ranks(values: np.ndarray) -> np.ndarray:
    """From 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[places]


def correlate_subject(
    toy: Toy, photos: list[Image.Image], encoders: Encoders, count: int
) -> Correlation:
    """Both measures of `count` pictures against the truth."""
    rng = random.Random(f"look-alikes of {toy}")

    # The look-alikes, each from a few sides
    look_alike_scenes = []
    for _ in range(LOOK_ALIKES):
        look_alike = sample_toy(rng, toy.kind)
        look_alike_scenes += [sample_scene(rng, look_alike, held_out=None) for _ in range(VIEWS)]

    # Pictures that are more or less true
    scenes = []
    truth = []
    for _ in range(count):
        look_alike = sample_toy(rng, toy.kind)
        wrong = rng.sample(LOOKS, rng.randrange(len(LOOKS) + 1))
        mixed = replace(toy, **{look: getattr(look_alike, look) for look in wrong})
        scenes.append(sample_scene(rng, mixed, held_out=None))
        right = [getattr(mixed, look) == getattr(toy, look) for look in LOOKS]
        truth.append(np.mean(right))

    of_photos = encoders.embed_dino_images(photos)
    of_others = encoders.embed_dino_images(render_images(look_alike_scenes))
    embeds = encoders.embed_dino_images(render_images(scenes))
    truth = np.array(truth)
    return Correlation(
        dino=compute_spearman(subject_fidelity(embeds, of_photos).numpy(), truth),
        rank=compute_spearman(compute_rank(embeds, of_photos, of_others).numpy(), truth),
    )


def render_images(scenes: list[Scene]) -> list[Image.Image]:
    """Render the scenes."""
    return [Image.fromarray(image.numpy()) for image in render(scenes, SIZE_PX)]


def load_photos(folder: Path) -> list[Image.Image]:
    """Load the photos of a sample subject."""
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))]


def main() -> None:
    encoders = load_encoders(get_assets_folder() / "toy-sdxl")
    correlations = []
    for name in SUBJECTS:
        correlation = correlate_subject(
            load(name).toy, load_photos(FOLDER / name), encoders, IMAGE_COUNT
        )
        print(f"{name}: DINO {correlation.dino:.3f}, rank {correlation.rank:.3f}", flush=True)
        correlations.append(correlation)
    print(f"DINO {bootstrap_mean([correlation.dino for correlation in correlations])}")
    print(f"rank {bootstrap_mean([correlation.rank for correlation in correlations])}")
    gains = [correlation.rank - correlation.dino for correlation in correlations]
    print(f"rank less DINO {bootstrap_mean(gains):+}")


if __name__ == "__main__":
    main()
