"""Pictures that the program made of a person's photos: their headers say of which, so that none is made twice."""

from io import BytesIO
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dreambooth_moslora.photos.image_file import UnreadableImageError, open_image

__all__ = ["made_from", "marked_png"]

KEY = "made-from"


def marked_png(image: Image.Image, key: str) -> bytes:
    """A PNG; `key`, if any, goes into its header, where `made_from` finds it."""
    facts = PngInfo()
    if key:
        facts.add_text(KEY, key)
    buffer = BytesIO()
    image.save(buffer, format="PNG", pnginfo=facts, optimize=True)
    return buffer.getvalue()


def made_from(path: Path) -> str | None:
    """The key in the header of a picture; None where there is none."""
    try:
        return open_image(path).info.get(KEY) if path.is_file() else None
    except UnreadableImageError:
        return None
