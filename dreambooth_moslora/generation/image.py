"""A finished picture, with its recipe for the PNG."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import PIL.Image
from PIL.PngImagePlugin import PngInfo

from dreambooth_moslora.generation.params import GenerationParams, Provenance

__all__ = ["Image", "recipe_text"]


@dataclass(frozen=True)
class Image:
    """Image `index`, with the parameters of this one image and its provenance."""

    index: int
    pixels: PIL.Image.Image
    params: GenerationParams
    provenance: Provenance

    def save(self, path: str | Path) -> Path:
        """Write a PNG with the recipe."""
        self._write(path)
        return Path(path)

    def png(self) -> bytes:
        """The bytes of that file."""
        file = BytesIO()
        self._write(file)
        return file.getvalue()

    def _write(self, target: str | Path | BytesIO) -> None:
        self.pixels.save(target, format="PNG", pnginfo=recipe_text(self.params, self.provenance))


def recipe_text(params: GenerationParams, provenance: Provenance) -> PngInfo:
    """The recipe as text chunks of a PNG, one for each of its parts."""
    text = PngInfo()
    for key, value in params.to_png_text(provenance).items():
        text.add_itxt(key, value)
    return text
