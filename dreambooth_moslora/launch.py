"""Processes that a launcher started for this run."""

import os


def process_count() -> int:
    """Processes that a launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the run's first process, the only one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"
