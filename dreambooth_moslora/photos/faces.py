"""Find and compare faces, by YuNet and SFace through OpenCV.

The weights come from the hub at the first use.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos import photo_file
from dreambooth_moslora.photos.augment import Box
from dreambooth_moslora.photos.pretrained import is_hub_answering
from dreambooth_moslora.settings import subject_kinds, train_config
from dreambooth_moslora.settings.metric_kinds import SFACE, YUNET

MAX_INPUT_PX = 640
"""Longer side of YuNet's input, in which it finds faces of 10 to 300 px."""
MIN_CERTAINTY = 0.8
"""YuNet's certainty below which a box is no face."""
MIN_FACE_SHARE = 0.1
"""Share of the photo's shorter side below which a face has a dozen latents in a 1024 px crop."""
SECOND_SHARE = 0.5
"""A face with this share of the largest one's side, or more, is of a second person, no
passer-by."""


@dataclass(frozen=True)
class Face:
    """Face in an upright image."""

    box: Box  # in the upright image
    detection: Any = None  # the detector's row of it, which the comparer reads


@dataclass(frozen=True)
class FaceReader:
    """Functions that find and compare faces."""

    find: Callable[[Image.Image], list[Face]]  # in an RGB image, the largest first
    vector: Callable[[Image.Image, Face], np.ndarray]  # a unit vector (D,) of a face
    load: Callable[[], object] = bool  # the comparer, so that a missing file is reported early

    def embed_faces(self, images: Sequence[Image.Image]) -> list[np.ndarray | None]:
        """Return the unit vector (D,) of each image's largest face; None for an image without a
        face."""
        embeddings = []
        for image in images:
            rgb = image.convert("RGB")
            faces = self.find(rgb)
            embeddings.append(self.vector(rgb, faces[0]) if faces else None)
        return embeddings


def load_face_reader() -> FaceReader:
    """Return YuNet and SFace, each loaded at its first use. Raises UserError without OpenCV, and
    later for missing weights."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # OpenCV 5 warns of its own engine
    try:
        import cv2
    except ImportError as error:
        raise UserError("faces are found by OpenCV: pip install opencv-python-headless") from error

    @cache
    def finder() -> Any:
        path = download_weights(*YUNET)
        return cv2.FaceDetectorYN.create_and_replace(
            path, "", (MAX_INPUT_PX, MAX_INPUT_PX), MIN_CERTAINTY
        )

    @cache
    def comparer() -> Any:
        return cv2.FaceRecognizerSF.create_and_replace(download_weights(*SFACE), "")

    def find(image: Image.Image) -> list[Face]:
        # YuNet sees a shrunk copy; its rows are boxes, five points and a certainty.
        scale = min(1.0, MAX_INPUT_PX / max(image.size))
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        finder().setInputSize(size)
        _, rows = finder().detect(to_bgr(image.resize(size)))
        faces = []
        for row in [] if rows is None else rows:
            row = np.asarray(row, dtype=np.float32).copy()
            row[:14] /= scale
            x0, y0, width, height = map(float, row[:4])
            faces.append(Face(box=(x0, y0, x0 + width, y0 + height), detection=row))
        return sorted(faces, key=get_longer_side, reverse=True)

    def vector(image: Image.Image, face: Face) -> np.ndarray:
        # SFace wants the face turned upright, by its five points.
        upright = comparer().alignCrop(to_bgr(image), face.detection)
        values = np.asarray(comparer().feature(upright), dtype=np.float32).ravel()
        return values / max(float(np.linalg.norm(values)), 1e-6)

    return FaceReader(find=find, vector=vector, load=comparer)


def to_bgr(image: Image.Image) -> np.ndarray:
    """Return the pixels as uint8 (height, width, 3), in OpenCV's order of colours."""
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


def get_longer_side(face: Face) -> float:
    """Return the longer side of a face's box, px."""
    x0, y0, x1, y1 = face.box
    return max(x1 - x0, y1 - y0)


def download_weights(repository: str, file: str) -> str:
    """Return the path of a model's file, from the hub or from its cache if the hub is unreachable.
    Raises UserError when it is in neither."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        is_local = not is_hub_answering(repository)
        return hf_hub_download(repository, file, local_files_only=is_local)
    except (OSError, HfHubHTTPError) as error:
        raise UserError(
            f"faces: {repository} is not here and cannot be fetched: connect to the hub once"
        ) from error


def add_faces(
    config: train_config.TrainConfig, photos: Sequence[photo_file.Photo]
) -> list[photo_file.Photo]:
    """Return the photos, with the face's box on those of a person and a remark where it is small or
    not found. Raises UserError."""
    if not subject_kinds.has_face_subject(config.each_subject):
        return list(photos)
    kinds = [subject_kinds.get_subject_kind(subject) for subject in config.each_subject]
    reader = load_face_reader()
    return [
        add_face(photo, reader.find(photo_file.open_rgb(photo)))
        if kinds[photo.subject].has_face
        else photo
        for photo in photos
    ]


def add_face(photo: photo_file.Photo, faces: Sequence[Face]) -> photo_file.Photo:
    """Return the photo with its largest face, and with a remark if that is small, or not the only
    one."""
    if not faces:
        return replace(photo, reasons=(*photo.reasons, "no face was found"))
    reasons = photo.reasons

    # Its size
    sides = [get_longer_side(face) for face in faces]
    share = sides[0] / min(photo.size_px)
    if share < MIN_FACE_SHARE:
        reasons = (*reasons, f"small face: {share:.0%} of the frame")

    # Other people in the photo
    people = sum(side >= SECOND_SHARE * sides[0] for side in sides)
    if people > 1:
        reasons = (
            *reasons,
            f"{people} faces: the largest is taken for the person's; crop the others away",
        )
    return replace(photo, face=faces[0].box, reasons=reasons)
