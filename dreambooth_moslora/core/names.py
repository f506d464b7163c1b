"""Names to show or write: a base's name without its path, free names for files, and the encoders that score
pictures."""

import os
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path

__all__ = ["CLIP", "DINO", "SUBJECT_FILE", "free_name", "public_name"]

CLIP, DINO = "openai/clip-vit-large-patch14", "facebook/dinov2-base"
SUBJECT_FILE = "subject.json"
"""Beside photos: their token and class word, for commands that take folders of subjects; of a toy, what it is."""
"""Hub ids of the encoders that score pictures of SDXL."""

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def public_name(name: str | Path) -> str:
    """A hub id or `toy` unchanged; of a path, also a Windows path, only its last part, since the rest is private."""
    path = os.path.expanduser(str(name))
    if path and os.path.exists(path):
        return os.path.basename(os.path.abspath(path))
    text = str(name).replace("\\", "/")
    return text if HUB_ID.fullmatch(text) else Path(text).name


def free_name(name: str, is_taken: Callable[[str], bool], separator: str = "_", *, is_numbered: bool = False) -> str:
    """`name`, or the first of `name_2`, `name_3` … that is not taken; with `is_numbered` it begins at `name_1`."""
    if not is_numbered and not is_taken(name):
        return name
    numbers = count(1 if is_numbered else 2)
    return next(numbered for n in numbers if not is_taken(numbered := f"{name}{separator}{n}"))
