"""Pictures that the program made from photos: a key in the header records the sources, so that none is made twice."""

from io import BytesIO
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dreambooth_moslora.photos.image_file import UnreadableImageError, open_image

__all__ = ["made_from", "marked_png"]

KEY = "made-from"


def marked_png(image: Image.Image, key: str) -> bytes:
    """A PNG with `key`, if any, in its header for `made_from`."""
    facts = PngInfo()
    if key:
        facts.add_text(KEY, key)
    buffer = BytesIO()
    image.save(buffer, format="PNG", pnginfo=facts, optimize=True)
    return buffer.getvalue()


def made_from(path: Path) -> str | None:
    """The key in the picture's header; None when there is none."""
    try:
        return open_image(path).info.get(KEY) if path.is_file() else None
    except UnreadableImageError:
        return None
