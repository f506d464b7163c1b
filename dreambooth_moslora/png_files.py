"""Pictures as PNG files, whole or not at all."""

from io import BytesIO
from pathlib import Path

from PIL import Image

from dreambooth_moslora.rundir import atomic_write

__all__ = ["write_png"]


def write_png(path: Path, image: Image.Image) -> None:
    """A PNG, whatever the path's ending says. The folder must exist."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    atomic_write(path, buffer.getvalue())
