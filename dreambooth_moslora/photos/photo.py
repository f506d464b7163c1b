"""One usable photo: its file, captions, mask and pixels."""

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
    """A usable photo. `size_px` is (h, w) upright. `mask_path` equals `path` if the transparency is the mask.

    Each exposure uses one of the `captions`; `is_captioned` if they are the photo's own. `bare_prompt` is the instance
    prompt if none of them is it, as some exposures then use it (`--instance_prompt_share`). `reasons` are remarks
    for the user (too small, rotated by EXIF, …), none of which forbids its use. `subject` is the number of the
    run's subject, from 0.
    """

    path: Path
    size_px: tuple[int, int]
    captions: tuple[str, ...]
    mask_path: Path | None = None
    reasons: tuple[str, ...] = ()
    is_captioned: bool = False
    bare_prompt: str | None = None
    subject: int = 0

    @property
    def kept_name(self) -> str:
        """Name of files that a run folder keeps for it; those of further subjects are in `1/` and so on."""
        return f"{self.subject}/{self.path.name}" if self.subject else self.path.name


def counts_of(photos: Iterable[Photo]) -> list[int]:
    """The number of photos of each subject."""
    return [count for _, count in sorted(Counter(photo.subject for photo in photos).items())]


def quoted(photo: Photo) -> str:
    """Its captions in quotes."""
    return " ".join(f"“{caption}”" for caption in photo.captions)


def open_rgb(photo: Photo) -> Image.Image:
    """The photo's pixels: RGB, upright, on white. Raises UserError when it cannot be read any more."""
    try:
        return to_rgb(open_image(photo.path))
    except UnreadableImageError as error:
        raise UserError(f"{photo.path}: {error}; it changed since the folder was read.") from error
