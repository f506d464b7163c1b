"""Read and write the record of photos that a model made (`enlarge`), which lies beside them.

`RECORD_NAME` is {file name: `SyntheticRecord`}, of the photos in the folder and of those in
`REJECTED_NAME`. Only the photos in the folder itself are used; the record describes all of them.
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

RECORD_NAME = "made_by.json"
REJECTED_NAME = "rejected"
"""Names in a folder of photos: the record, and the folder of rejected photos."""


class SyntheticRecord(TypedDict):
    """Origin of a synthetic photo, and the result of sorting."""

    base: str
    licence: str  # the base's
    prompt: str
    seed: int
    made_from: str  # a key of all that decides its pixels
    likeness: float  # cosine to the photo that it was made from
    rejected: str  # the reason; "" for one that was kept


def read_record(folder: Path) -> dict[str, SyntheticRecord]:
    """Return the record of a folder; {} if it has none. Raises UserError for a damaged one."""
    path = folder / RECORD_NAME
    return read_json(path, dict[str, SyntheticRecord]) if path.is_file() else {}


def write_record(folder: Path, record: dict[str, SyntheticRecord]) -> None:
    """Write the record of a folder, atomically."""
    write_atomic(folder / RECORD_NAME, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def format_maker(record: SyntheticRecord) -> str:
    """Return the model and its licence on one line, without control characters."""
    return escape_control_characters(format_error(f"{record['base']}, licence {record['licence']}"))


def filter_real_photos(photos: Sequence[Photo]) -> list[Photo]:
    """Return the photos that no model made, with which images are compared; all photos if no photo
    is real."""
    return [photo for photo in photos if not photo.made_by] or list(photos)


def describe_synthetic(photos: Sequence[Photo], weight: float) -> list[str]:
    """Return a line for each model: how many photos it made, and the weight of their loss."""
    counts = Counter(photo.made_by for photo in photos if photo.made_by)
    return [
        f"{count} of {len(photos)} photos were made by {name}; "
        f"their loss has the weight {weight:g} (--synthetic_weight)"
        for name, count in counts.items()
    ]
