"""Class images for prior preservation (Ruiz et al. 2022, section 3.3): what the base already knows of the class.

A folder is topped up to the wanted number with generated images of the class prompt. `manifest.json` beside
them records how each was made: prompt, seed, model, size, and its SHA-256. The user's own images count and come
first. Generated images of another prompt, model or size stay in the folder but are not used. A generated image
is drawn again when its file or its entry in the manifest is damaged.
"""

import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dreambooth_moslora.core import atomic_write, file_digest, rename, seed_of, spelled_out
from dreambooth_moslora.photos.photo_file import Photo, UnreadableImageError, open_image
from dreambooth_moslora.pictures import png_bytes

logger = logging.getLogger(__name__)

MANIFEST, DIGEST = "manifest.json", "sha256"
GENERATED = re.compile(r"class_[0-9a-f]{8}_\d{5}\.png")


@dataclass(frozen=True)
class ClassImages:
    """The class images of one prompt, base and size (h, w) in `folder`; `model` names the base without its path."""

    folder: Path
    prompt: str
    model: str
    seed: int
    size_px: tuple[int, int]

    @property
    def resolution(self) -> int | str:
        """As the manifest writes it: the side of a square, else width x height."""
        height, width = self.size_px
        return height if height == width else f"{width}x{height}"

    def name(self, index: int) -> str:
        tag = seed_of(self.prompt, self.model, self.resolution) % 16**8
        return f"class_{tag:08x}_{index:05d}.png"

    def image_seed(self, index: int) -> int:
        return seed_of(self.seed, "class_image", index) % 2**32

    def manifest(self) -> dict[str, dict]:
        """File name -> {prompt, seed, model, resolution, perhaps sha256} of every generated image; {} if damaged."""
        try:
            entries = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            return {}
        entries = entries if isinstance(entries, dict) else {}
        return {name: facts for name, facts in entries.items() if isinstance(facts, dict)}

    def stale(self, paths: list[Path]) -> set[Path]:
        """The generated images of another or unknown prompt, model or size."""
        known, wanted = self.manifest(), self.facts().items()
        return {path for path in self.generated(paths) if not wanted <= known.get(path.name, {}).items()}

    def generated(self, paths: list[Path]) -> set[Path]:
        """The images that were generated. Their names tell, even without the manifest."""
        known = self.manifest()
        return {path for path in paths if path.name in known or GENERATED.fullmatch(path.name)}

    def lacking(self, count: int, batch_size: int) -> list["ClassBatch"]:
        """The batches of the first `count` images in which one is missing, whole: last bits depend on neighbours."""
        known, found = self.manifest(), []
        for start in range(0, count, batch_size):
            indices = range(start, min(start + batch_size, count))
            missing = tuple(index for index in indices if not self._is_as_made(index, known))
            if not missing:
                continue
            seeds = []
            for index in indices:  # another run may have drawn the image
                seed = known.get(self.name(index), {}).get("seed")
                is_one = type(seed) is int and 0 <= seed < 2**32
                seeds.append(seed if is_one else self.image_seed(index))
            found.append(ClassBatch(self, tuple(indices), tuple(seeds), missing))
        paths = [self.folder / self.name(index) for batch in found for index in batch.missing]
        if damaged := [path for path in paths if os.path.lexists(path)]:
            said = "has changed since it was made: it is drawn again, like every other changed class image."
            logger.warning("%s", spelled_out(f"{damaged[0]} {said}"))
        return found

    def facts(self) -> dict[str, object]:
        """What all images of this set have in common."""
        return {"prompt": self.prompt, "model": self.model, "resolution": self.resolution}

    def _is_as_made(self, index: int, known: dict[str, dict]) -> bool:
        """Whether the file exists, opens, has the right size, and matches its manifest entry."""
        path, made = self.folder / self.name(index), known.get(self.name(index), {})
        try:
            fits = open_image(path).size == self.size_px[::-1]
        except UnreadableImageError:
            return False
        return fits and self.facts().items() <= made.items() and made.get(DIGEST) in (None, file_digest(path))

    def write(self, index: int, seed: int, content: bytes) -> None:
        """Write the manifest's entry, then the image. An edited picture in its place goes to the folder `changed`."""
        path = self.folder / self.name(index)
        facts = {**self.facts(), "seed": seed, DIGEST: hashlib.sha256(content).hexdigest()}
        entries = {**self.manifest(), path.name: facts}
        with suppress(UnreadableImageError):
            open_image(path)
            if (found := file_digest(path)) != facts[DIGEST]:  # the user may have edited it
                kept = self.folder / "changed"
                kept.mkdir(exist_ok=True)
                rename(path, kept / f"{path.stem}_{found[:8]}.png")
        atomic_write(self.folder / MANIFEST, json.dumps(entries, indent=1, sort_keys=True))
        atomic_write(path, content)


@dataclass(frozen=True)
class ClassBatch:
    images: ClassImages
    indices: tuple[int, ...]  # generated together
    seeds: tuple[int, ...]  # of each
    missing: tuple[int, ...]  # which are kept

    def __len__(self) -> int:
        return len(self.indices)

    def files(self, generate: Callable[[str, list[int]], list[Image.Image]]) -> list[bytes]:
        """Generate the batch; returns the missing images as PNG files."""
        pictures = dict(zip(self.indices, generate(self.images.prompt, list(self.seeds)), strict=True))
        return [png_bytes(pictures[index]) for index in self.missing]

    def keep(self, files: list[bytes]) -> None:
        """Write those files. One process does it: all images are listed in one manifest."""
        seed_of_each = dict(zip(self.indices, self.seeds))
        for index, content in zip(self.missing, files, strict=True):
            self.images.write(index, seed_of_each[index], content)


def shares(sizes: Mapping[tuple[int, int], int], total: int) -> dict[tuple[int, int], int]:
    """Split `total` in proportion to the photos of each size (h, w), each at least one if possible."""
    exact = {size: total * count / sum(sizes.values()) for size, count in sorted(sizes.items())}
    found = dict.fromkeys(exact, int(total >= len(exact)))
    for _ in range(total - sum(found.values())):
        found[max(exact, key=lambda size: exact[size] - found[size])] += 1
    return found


def are_draws(photos: Sequence[Photo], seed: int) -> bool:
    """Whether a run of this seed draws each of these class images: class_0a1b2c3d_00007.png has the seed of 7."""
    sets = {folder: ClassImages(folder, "", "", seed, (0, 0)) for folder in {photo.path.parent for photo in photos}}
    known = {folder: images.manifest() for folder, images in sets.items()}
    for path in (photo.path for photo in photos):
        drawn = known[path.parent].get(path.name, {}).get("seed")
        if not GENERATED.fullmatch(path.name):
            return False
        if drawn != sets[path.parent].image_seed(int(path.stem.rpartition("_")[2])):
            return False
    return True
