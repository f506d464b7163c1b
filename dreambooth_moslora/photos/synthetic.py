"""Photos that a model made (`enlarge`): the record that lies beside them, and what is said of them.

RECORD is {file name: `SyntheticRecord`}, of the kept photos and of those in REJECTED. Where a photo
lies decides whether it is used; the record says what it is wherever it lies.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from typing_extensions import TypedDict

from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.errors import escape_control_characters, format_error
from dreambooth_moslora.photos.photo_file import Photo

# In a folder of photos: the record, and the folder of the photos that were sorted out
RECORD_NAME = "made_by.json"
REJECTED_NAME = "rejected"


class SyntheticRecord(TypedDict):
    """How a photo was made, and what the sorting found."""

    base: str
    licence: str  # the base's
    prompt: str
    seed: int
    made_from: str  # a key of all that decides its pixels
    likeness: float  # cosine to the photo that it was made from
    rejected: str  # the reason; "" for one that was kept


def read_record(folder: Path) -> dict[str, SyntheticRecord]:
    """The record of a folder; {} where there is none. Raises UserError for a damaged one."""
    path = folder / RECORD_NAME
    return read_json(path, dict[str, SyntheticRecord]) if path.is_file() else {}


def write_record(folder: Path, record: dict[str, SyntheticRecord]) -> None:
    write_atomic(folder / RECORD_NAME, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def format_maker(record: SyntheticRecord) -> str:
    """The model and its licence, for sentences: one line, whoever wrote the record."""
    return escape_control_characters(format_error(f"{record['base']}, licence {record['licence']}"))


def filter_real_photos(photos: Sequence[Photo]) -> list[Photo]:
    """The photos that no model made, with which pictures are compared; all if there is no other."""
    return [photo for photo in photos if not photo.made_by] or list(photos)


def describe_synthetic(photos: Sequence[Photo], weight: float) -> list[str]:
    """How many photos each model made, and what their loss weighs; none without such photos."""
    counts = Counter(photo.made_by for photo in photos if photo.made_by)
    said = []
    for name, count in counts.items():
        said.append(
            f"{count} of {len(photos)} photos were made by {name}; "
            f"their loss has the weight {weight:g} (--synthetic_weight)"
        )
    return said
