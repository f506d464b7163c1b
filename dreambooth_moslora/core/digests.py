"""Digests of files and settings, and the folder of caches that are named by them."""

import hashlib
import json
import os
from pathlib import Path

__all__ = ["content_key", "default_cache_dir", "file_digest"]


def default_cache_dir() -> Path:
    """The folder of disk caches of all runs: `$XDG_CACHE_HOME/dreambooth_moslora`, or `~/.cache/…`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dreambooth_moslora"


def content_key(**facts: object) -> str:
    """A hex key of JSON-able values, the same in every process."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
