"""Class images for prior preservation (Ruiz et al. 2022, section 3.3): what the base already knows of the class.

A folder is topped up to the asked number with images of the class prompt. `manifest.json` beside them says of each
what made it: prompt, seed, model. Images that a person put there count and come first; generated ones of another
prompt or model stay where they are and are left out.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from dreambooth_moslora.rundir import atomic_write
from dreambooth_moslora.seeding import seed_of

__all__ = ["ClassImages"]

Generate = Callable[[str, list[int]], list[Image.Image]]
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ClassImages:
    """The class images of one prompt and one base in `folder`; `model` identifies the base without any path."""

    folder: Path
    prompt: str
    model: str
    seed: int

    def name(self, index: int) -> str:
        tag = seed_of(self.prompt, self.model) % 16**8
        return f"class_{tag:08x}_{index:05d}.png"

    def image_seed(self, index: int) -> int:
        return seed_of(self.seed, "class_image", index) % 2**32

    def manifest(self) -> dict[str, dict]:
        """File name -> {prompt, seed, model} of every generated image that the folder has known."""
        path = self.folder / MANIFEST
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def is_stale(self, path: Path) -> bool:
        """Generated, but for another prompt or model."""
        facts = self.manifest().get(path.name)
        return facts is not None and (facts["prompt"], facts["model"]) != (self.prompt, self.model)

    def is_ours(self, path: Path) -> bool:
        return path.name in self.manifest()

    def top_up(self, count: int, batch_size: int, generate: Generate) -> Iterator[int]:
        """Make the first `count` generated images exist; yields how many do.

        Whole batches are made anew even for one missing image: an image's last bits can depend on its neighbours,
        and a run that was killed here has to end as an unbroken one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, count, batch_size):
            indices = range(start, min(start + batch_size, count))
            if not all((self.folder / self.name(i)).is_file() for i in indices):
                images = generate(self.prompt, [self.image_seed(i) for i in indices])
                for index, image in zip(indices, images):
                    self._write(index, image)
            yield indices[-1] + 1

    def _write(self, index: int, image: Image.Image) -> None:
        """The manifest first: an image of unknown origin would count as the person's own."""
        facts = {"prompt": self.prompt, "seed": self.image_seed(index), "model": self.model}
        entries = {**self.manifest(), self.name(index): facts}
        atomic_write(self.folder / MANIFEST, json.dumps(entries, indent=1, sort_keys=True))
        atomic_write(self.folder / self.name(index), png_bytes(image))


def png_bytes(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
