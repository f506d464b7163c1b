"""Renders captioned training pictures of the toy world.

    python -m toybox.data.render_dataset --out DIR --count 30000 --seed 1 --workers 2

writes shards of 1000 pictures: images_0000.npy (uint8, (1000, H, W, 3)) and scenes_0000.jsonl (one
line per picture: the scene, a caption and the canonical caption). A shard depends only on the seed
and its number, and appears only when complete, so the command may be stopped and run again. No
picture shows a held-out combination, unless `--all_combinations` asks for them (for the judge,
which must know them). `--narrow` is for the training of a base only: what measures it keeps the
wide sampling.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from toybox.captions import caption, format_canonical_caption
from toybox.render import render
from toybox.world import sample_scene

__all__ = ["Shard", "write_shard"]

SHARD_SIZE = 1000


@dataclass(frozen=True)
class Shard:
    """Piece of work: its folder, number, count and size of pictures, device, and whether to
    compile."""

    out: Path
    number: int
    count: int
    seed: int
    size_px: int
    device: str
    compiled: bool = True
    all_combinations: bool = False
    narrow: bool = False

    @property
    def images_path(self) -> Path:
        return self.out / f"images_{self.number:04d}.npy"

    @property
    def scenes_path(self) -> Path:
        return self.out / f"scenes_{self.number:04d}.jsonl"

    @property
    def is_done(self) -> bool:
        return self.images_path.exists() and self.scenes_path.exists()


def write_shard(shard: Shard) -> Shard:
    """Render and write one shard; each file has a temporary name first."""
    rng = random.Random(f"{shard.seed}/{shard.number}")
    held_out = None if shard.all_combinations else False
    scenes = [sample_scene(rng, held_out=held_out, narrow=shard.narrow) for _ in range(shard.count)]
    lines = [
        json.dumps(
            {
                "scene": s.to_dict(),
                "caption": caption(s, rng),
                "canonical_caption": format_canonical_caption(s),
            }
        )
        for s in scenes
    ]
    pictures = render(scenes, shard.size_px, shard.device, shard.compiled).cpu().numpy()
    temporary = shard.scenes_path.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(shard.scenes_path)
    temporary = shard.images_path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, pictures)
    temporary.replace(shard.images_path)
    return shard


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--count", type=int, default=30_000, help="pictures in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes, one thread each"
    )
    parser.add_argument("--size_px", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--all_combinations", action="store_true", help="the held-out ones too")
    parser.add_argument(
        "--narrow",
        action="store_true",
        help="one camera, two sights of a place: fewer views to learn",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    starts = range(0, args.count, SHARD_SIZE)
    shards = [
        Shard(
            args.out,
            number,
            min(SHARD_SIZE, args.count - start),
            args.seed,
            args.size_px,
            args.device,
            all_combinations=args.all_combinations,
            narrow=args.narrow,
        )
        for number, start in enumerate(starts)
    ]
    todo = [shard for shard in shards if not shard.is_done]
    print(f"{len(shards) - len(todo)} of {len(shards)} shards are there already", flush=True)
    if todo:
        write_all(todo, args.workers)
    (args.out / "all.json").write_text(json.dumps({"count": args.count, "seed": args.seed}) + "\n")


def write_all(todo: list[Shard], workers: int) -> None:
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        for done, shard in enumerate(pool.imap_unordered(write_shard, todo), 1):
            minutes = (time.monotonic() - began) / 60
            remaining_min = minutes / done * (len(todo) - done)
            print(
                f"{shard.images_path.name}: {done}/{len(todo)} in {minutes:.1f} min, "
                f"{remaining_min:.1f} min left",
                flush=True,
            )


if __name__ == "__main__":
    main()
