"""A reader of faces for pictures that are painted here: YuNet's and SFace's weights are on the hub
alone. A face is a disc without green; its hue says whose it is. Faces stand beside each other."""

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dreambooth_moslora.photos import faces

RIGHT = (250, 0, 60)
WRONG = (60, 0, 250)


def painted(
    colour: tuple[int, int, int] | None,
    size_px: tuple[int, int] = (64, 64),
    box: tuple[float, ...] = (20, 10, 44, 34),
    seed: int = 0,
) -> Image.Image:
    """A picture (width, height) of noise with a face of this colour, or with none."""
    noise = np.random.default_rng(seed).integers(90, 200, (*size_px[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    if colour:
        ImageDraw.Draw(image).ellipse(box, fill=colour)
    return image


def find(image: Image.Image) -> list[faces.Face]:
    right, down = np.nonzero(np.asarray(image)[:, :, 1].T < 10)
    if not len(right):
        return []

    # From left to right: a column without a face divides two.
    gaps = np.nonzero(np.diff(right) > 1)[0] + 1
    boxes = []
    for x, y in zip(np.split(right, gaps), np.split(down, gaps), strict=True):
        boxes.append((x.min(), y.min(), x.max() + 1, y.max() + 1))
    detected = [faces.Face(box=tuple(map(float, box))) for box in boxes]
    return sorted(detected, key=faces.get_longer_side, reverse=True)


def vector(image: Image.Image, face: faces.Face) -> np.ndarray:
    x0, y0, x1, y1 = face.box
    middle = image.getpixel((int(x0 + x1) // 2, int(y0 + y1) // 2))
    values = np.array(middle, dtype=np.float32)
    return values / np.linalg.norm(values)


READER = faces.FaceReader(find=find, vector=vector)


@pytest.fixture
def stub_faces(monkeypatch) -> Iterator[faces.FaceReader]:
    """The encoder of faces is the one above."""
    for module in ("photos.faces", "evaluation.metrics"):
        monkeypatch.setattr(f"dreambooth_moslora.{module}.load_face_reader", lambda: READER)
    yield READER
