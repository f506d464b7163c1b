"""Render individuals from several sides, in several places and lights: what the ViT learns from.

python -m toybox.render_views --out VIEWS --toys 4000 --views 4
"""

import argparse
import json
import random
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from toybox.render import render
from toybox.world import KINDS, PLACES, sample_scene, sample_toy

__all__ = ["views_of"]


def views_of(number: int, views: int = 4) -> tuple[str, np.ndarray]:
    """Kind and uint8 (views, 128, 128, 3) of individual `number`, each view in another place."""
    torch.set_num_threads(1)
    rng = random.Random(f"individual {number}")
    toy = sample_toy(rng, kind=KINDS[number % len(KINDS)])
    places = rng.sample(PLACES, views)
    return toy.kind, render([sample_scene(rng, toy, place, held_out=None) for place in places]).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toys", type=int, default=4000)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with Pool(args.workers) as pool:
        jobs = pool.imap(views_of, range(args.toys), chunksize=8)
        drawn = list(tqdm(jobs, total=args.toys, mininterval=10))
    np.save(args.out / "views.npy", np.stack([images for _, images in drawn]))
    (args.out / "kinds.json").write_text(json.dumps([kind for kind, _ in drawn]), encoding="utf-8")


if __name__ == "__main__":
    main()
