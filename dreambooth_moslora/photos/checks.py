"""Finds blurred photos and nearly equal pairs by their pixels.

Sharpness compares second differences with first ones at edges: √mean L² / √mean |∇|², over tiles. It measures
how steep edges are, not how many there are, so a plain background is fine. The sharpest tenth of the edges
decides, so a blurred background is fine too. Real photos have 1.8 to 3.2; blurred by a Gaussian of 3 px at 1024
px they have 0.5 to 0.8.

Likeness is the correlation of 16 × 16 thumbnails: different photos of one subject have up to 0.8; a copy that
is cropped by a few percent, brighter or smaller has 0.93 to 1.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from dreambooth_moslora.photos.folder import PhotoReport
from dreambooth_moslora.photos.photo import Photo, open_rgb

__all__ = ["examine", "likeness", "sharpness", "thumbnail"]

MIN_SHARPNESS = 0.85
MAX_LIKENESS = 0.92
LOOK_PX, MIN_LOOK_PX = 512, 128
TILE_PX = 16
THUMBNAIL_PX = 16
EDGE_PERCENTILE, SHARPEST_PERCENTILE = 80, 90


@dataclass(frozen=True)
class Look:
    """What is kept of a photo's pixels."""

    photo: Photo
    sharpness: float
    thumbnail: np.ndarray


def examine(report: PhotoReport, resolution_px: int = LOOK_PX) -> PhotoReport:
    """The report with "blurred" and "near-duplicate" added to the photos' reasons.

    Photos are examined at the size of training: finer detail need not be sharp.
    """
    looks = [look_at(photo, min(LOOK_PX, max(MIN_LOOK_PX, resolution_px))) for photo in report.photos]
    photos = [
        replace(look.photo, reasons=(*look.photo.reasons, *verdicts(look, looks[:number])))
        for number, look in enumerate(looks)
    ]
    return replace(report, photos=photos)


def look_at(photo: Photo, look_px: int) -> Look:
    image = open_rgb(photo)
    return Look(photo, sharpness(image, look_px), thumbnail(image))


def verdicts(look: Look, earlier: list[Look]) -> list[str]:
    found = []
    if look.sharpness < MIN_SHARPNESS:
        found.append(f"blurred: sharpness {look.sharpness:.2f}, sharp photos have {MIN_SHARPNESS} and more")
    twin = max(earlier, key=lambda other: likeness(look.thumbnail, other.thumbnail), default=None)
    if twin is not None and likeness(look.thumbnail, twin.thumbnail) > MAX_LIKENESS:
        found.append(f"near-duplicate of {twin.photo.path.name}")
    return found


def sharpness(image: Image.Image, look_px: int = LOOK_PX) -> float:
    """Steepness of the sharpest edges of an RGB picture, scaled to `look_px`; 0 when it has no edges."""
    grey = np.asarray(shrunk(image, look_px).convert("L"), dtype=np.float32)
    if min(grey.shape) < TILE_PX + 2:
        return MIN_SHARPNESS  # too few pixels to tell
    inner = grey[1:-1, 1:-1]
    up, down, left, right = grey[:-2, 1:-1], grey[2:, 1:-1], grey[1:-1, :-2], grey[1:-1, 2:]
    second = tile_energy((4 * inner - up - down - left - right) ** 2)
    first = tile_energy(((right - left) ** 2 + (down - up) ** 2) / 4)
    edges = first >= np.percentile(first, EDGE_PERCENTILE)
    return float(np.percentile((second / (first + 1))[edges], SHARPEST_PERCENTILE))


def shrunk(image: Image.Image, look_px: int) -> Image.Image:
    scale = look_px / min(image.size)
    if scale >= 1:
        return image
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def tile_energy(squares: np.ndarray) -> np.ndarray:
    """(h, w) -> (h // 16, w // 16): root mean square of each tile."""
    rows, columns = (side // TILE_PX for side in squares.shape)
    tiles = squares[: rows * TILE_PX, : columns * TILE_PX].reshape(rows, TILE_PX, columns, TILE_PX)
    return np.sqrt(tiles.mean((1, 3)))


def thumbnail(image: Image.Image) -> np.ndarray:
    """Colours at 16 × 16 as a vector (768,) with mean 0 and length 1; zeros for a single flat colour."""
    small = image.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX, reducing_gap=3.0)
    values = np.asarray(small, dtype=np.float32).ravel()
    values = values - values.mean()
    length = float(np.linalg.norm(values))
    return values / length if length > 1e-3 else values * 0


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b)
