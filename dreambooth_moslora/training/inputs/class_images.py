"""Class images for prior preservation (Ruiz et al. 2022, section 3.3): what the base already knows of the class.

A folder is topped up to the asked number with images of the class prompt. `manifest.json` beside them says of each
what made it: prompt, seed, model, size. Images that a person put there count and come first; generated ones of another
prompt, model or size stay where they are and are left out.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dreambooth_moslora.core.pictures import write_png
from dreambooth_moslora.core.run_folder import atomic_write
from dreambooth_moslora.core.seeding import seed_of
from dreambooth_moslora.photos.image_file import UnreadableImageError, open_image

__all__ = ["ClassImages"]

Generate = Callable[[str, list[int]], list[Image.Image]]
MANIFEST = "manifest.json"
GENERATED = re.compile(r"class_[0-9a-f]{8}_\d{5}\.png")


@dataclass(frozen=True)
class ClassImages:
    """The class images of one prompt, one base and one size in `folder`; `model` names the base without any path."""

    folder: Path
    prompt: str
    model: str
    seed: int
    resolution_px: int

    def name(self, index: int) -> str:
        tag = seed_of(self.prompt, self.model, self.resolution_px) % 16**8
        return f"class_{tag:08x}_{index:05d}.png"

    def image_seed(self, index: int) -> int:
        return seed_of(self.seed, "class_image", index) % 2**32

    def manifest(self) -> dict[str, dict]:
        """File name -> {prompt, seed, model, resolution} of every generated image; a damaged file knows none."""
        try:
            entries = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        entries = entries if isinstance(entries, dict) else {}
        return {name: facts for name, facts in entries.items() if isinstance(facts, dict)}

    def stale(self, paths: list[Path]) -> set[Path]:
        """Those that were generated, but for another prompt, model or size, or nobody knows for which."""
        known, wanted = self.manifest(), identity(self.facts(0))
        return {path for path in self.generated(paths) if identity(known.get(path.name, {})) != wanted}

    def generated(self, paths: list[Path]) -> set[Path]:
        """Those that a person did not put there. The name tells it too where the manifest is lost."""
        known = self.manifest()
        return {path for path in paths if path.name in known or GENERATED.fullmatch(path.name)}

    def top_up(self, count: int, batch_size: int, generate: Generate) -> Iterator[int]:
        """Make the first `count` generated images exist; yields how many do.

        Whole batches are made anew even for one missing image: an image's last bits can depend on its neighbours,
        and a run that was killed here has to end as an unbroken one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, count, batch_size):
            indices = range(start, min(start + batch_size, count))
            known = self.manifest()
            if not all(known.get(self.name(i)) and self._is_usable(i) for i in indices):
                images = generate(self.prompt, [self.image_seed(i) for i in indices])
                for index, image in zip(indices, images):
                    self._write(index, image)
            yield indices[-1] + 1

    def facts(self, index: int) -> dict[str, object]:
        size = {"resolution": self.resolution_px}
        return {"prompt": self.prompt, "seed": self.image_seed(index), "model": self.model, **size}

    def _is_usable(self, index: int) -> bool:
        """Whether the file is there, opens, and has the size that it was generated in."""
        try:
            return open_image(self.folder / self.name(index)).size == (self.resolution_px, self.resolution_px)
        except UnreadableImageError:
            return False

    def _write(self, index: int, image: Image.Image) -> None:
        """The manifest first: an image of unknown origin would be left out."""
        entries = {**self.manifest(), self.name(index): self.facts(index)}
        atomic_write(self.folder / MANIFEST, json.dumps(entries, indent=1, sort_keys=True))
        write_png(self.folder / self.name(index), image)


def identity(facts: dict[str, object]) -> tuple[object, ...]:
    """What two images of one set have in common."""
    return tuple(facts.get(name) for name in ("prompt", "model", "resolution"))
