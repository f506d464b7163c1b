"""Does the rank among look-alikes tell the true individual better than DINO does?

    python -m toybox.measures.rank_truth --subjects 10

Each subject is rendered with 0 to 5 of its looks changed, in places that its photos do not show.
The truth is the share of looks that are right. Printed is the mean over the subjects of Spearman's
correlation with the truth, with its 95 % interval: of DINO, and of the rank.
"""

import argparse
import random
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from dreambooth_moslora.evaluation import metrics
from toybox.render import render
from toybox.truth import look_alike, pictures_of_look_alikes, view
from toybox.world import PLACES, Toy, sample_toy

__all__ = ["LOOKS", "main", "measured"]

LOOKS = ("colour2", "pattern", "material", "genes", "accessories")
PHOTOS = 5
SIZE_PX = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, default=10)
    args = parser.parse_args()
    encoders = metrics.load_encoders("toy")

    found = []
    for number in range(args.subjects):
        toy = sample_toy(random.Random(number))
        found.append(measured(toy, encoders))
        print(number, toy.kind, found[-1], flush=True)
    for name in found[0]:
        print(name, metrics.bootstrap_mean(np.array([one[name] for one in found])))


def measured(toy: Toy, encoders: metrics.Encoders) -> dict[str, float]:
    """Correlations with the truth of one subject, and the difference of the two."""
    # The photos, and pictures of toys that are ever less it, all in other places
    rng = random.Random(f"rank {toy}")
    places = rng.sample(PLACES, len(PLACES))
    photos = encoders.dino_images(drawn([toy] * PHOTOS, places[:PHOTOS], rng))
    toys = []
    for changes in range(len(LOOKS) + 1):
        for _ in range(2):
            toys.append(changed(toy, rng.sample(LOOKS, changes), rng))
    truth = np.array([sum(same(toy, one)) / len(LOOKS) for one in toys])
    shown = [rng.choice(places[PHOTOS:]) for _ in toys]
    pictures = encoders.dino_images(drawn(toys, shown, rng))

    others = [encoders.dino_images(some) for some in pictures_of_look_alikes(toy, SIZE_PX)]
    dino = metrics.subject_fidelity(pictures, photos).numpy()
    rank = -metrics.lookalike_rank(pictures, photos, others).numpy()
    of_dino, of_rank = spearman(dino, truth), spearman(rank, truth)
    return {"dino": of_dino, "rank": of_rank, "rank - dino": of_rank - of_dino}


def drawn(toys: list[Toy], places: list[str], rng: random.Random) -> list[Image.Image]:
    scenes = [view(rng, toy, place) for toy, place in zip(toys, places, strict=True)]
    return [Image.fromarray(image.numpy()) for image in render(scenes, SIZE_PX)]


def changed(toy: Toy, looks: list[str], rng: random.Random) -> Toy:
    """The toy with these looks of a look-alike."""
    other = look_alike(toy, rng)
    return replace(toy, **{name: getattr(other, name) for name in looks})


def same(one: Toy, other: Toy) -> list[bool]:
    return [getattr(one, name) == getattr(other, name) for name in LOOKS]


def spearman(values: np.ndarray, truth: np.ndarray) -> float:
    """The correlation of the ranks of both (N,), equal values having their mean rank; 0 where all
    values are equal."""
    ranks = torch.tensor(np.stack([mean_ranks(values), mean_ranks(truth)]))
    found = float(torch.corrcoef(ranks)[0, 1])
    return 0.0 if np.isnan(found) else found


def mean_ranks(values: np.ndarray) -> np.ndarray:
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return below + (equal - 1) / 2


if __name__ == "__main__":
    main()
