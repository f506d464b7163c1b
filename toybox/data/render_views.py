"""Renders individuals from several sides, in several places and lights: the ViT's training data.
Resumable.

python -m toybox.data.render_views --out VIEWS --toys 14004 --views 4
"""

import argparse
import json
import random
import shutil
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from toybox.data.pieces import load_or_make
from toybox.render import render
from toybox.world import KINDS, PLACES, Scene, Toy, sample_scene, sample_toy

__all__ = ["sample_sights", "render_block"]


BLOCK_SIZE = 8 * len(KINDS)  # toys rendered at once, eight of a kind


def render_block(block: range, views: int = 4) -> tuple[list[str], np.ndarray]:
    """Kinds, and uint8 (toys, views, 128, 128, 3), of the individuals with these numbers; each view
    has another place."""
    toys, scenes = [], []
    for number in block:
        rng = random.Random(f"individual {number}")
        toy = sample_toy(rng, kind=KINDS[number % len(KINDS)])
        toys.append(toy)
        scenes += sample_sights(rng, toy, views)
    images = render(scenes, compiled=True).numpy()
    return [toy.kind for toy in toys], images.reshape(len(toys), views, *images.shape[1:])


def sample_sights(rng: random.Random, toy: Toy, views: int) -> list[Scene]:
    """Sample `views` scenes of the toy, each from another side and in another place and light."""
    return [sample_scene(rng, toy, place, held_out=None) for place in rng.sample(PLACES, views)]


def load_block(block: range, views: int, folder: Path) -> tuple[list[str], np.ndarray]:
    """`render_block`, kept in a file of the folder; the kinds follow from the numbers."""
    path = folder / f"{block.start:06d}_{len(block)}_{views}.safetensors"
    images = load_or_make(
        path, lambda: {"images": torch.from_numpy(render_block(block, views)[1])}
    )["images"]
    return [KINDS[number % len(KINDS)] for number in block], images.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toys", type=int, default=14004)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    blocks = [
        range(start, min(start + BLOCK_SIZE, args.toys))
        for start in range(0, args.toys, BLOCK_SIZE)
    ]
    with get_context("spawn").Pool(args.workers, torch.set_num_threads, (1,)) as pool:
        jobs = pool.imap(partial(load_block, views=args.views, folder=args.out / "pieces"), blocks)
        kinds, images = zip(*tqdm(jobs, total=len(blocks), mininterval=10))
    np.save(args.out / "views.npy", np.concatenate(images))
    shutil.rmtree(args.out / "pieces")
    (args.out / "kinds.json").write_text(
        json.dumps([kind for block in kinds for kind in block]), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
