"""One usable photo: where it lies, its captions and its mask, and its pixels."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.photos.image_file import UnreadableImageError, open_image, to_rgb

__all__ = ["Photo", "counts_of", "open_rgb", "quoted"]


@dataclass(frozen=True)
class Photo:
    """A usable photo. `size_px` (h, w) upright. `mask_path` is `path` where transparency is the mask.

    Each exposure is trained with one of the `captions`; `is_captioned` when a person wrote them. `reasons` are what a
    person may want to know (too small, rotated by EXIF, …); none of them forbids its use. `subject`: number of the
    run's subject, from 0.
    """

    path: Path
    size_px: tuple[int, int]
    captions: tuple[str, ...]
    mask_path: Path | None = None
    reasons: tuple[str, ...] = ()
    is_captioned: bool = False
    subject: int = 0

    @property
    def kept_name(self) -> str:
        """Under which a run folder keeps what was made for it: those of further subjects lie in `1/` and so on."""
        return f"{self.subject}/{self.path.name}" if self.subject else self.path.name


def counts_of(photos: Iterable[Photo]) -> list[int]:
    """How many photos each subject has."""
    return [count for _, count in sorted(Counter(photo.subject for photo in photos).items())]


def quoted(photo: Photo) -> str:
    """Its captions as they are shown to a person."""
    return " ".join(f"“{caption}”" for caption in photo.captions)


def open_rgb(photo: Photo) -> Image.Image:
    """The photo's pixels: RGB, upright, on white."""
    try:
        return to_rgb(open_image(photo.path))
    except UnreadableImageError as error:
        raise UserError(f"{photo.path}: {error}; it changed since the folder was read.") from error
