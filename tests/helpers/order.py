"""Which file of tests begins first: the longest, so that no worker is left alone with it at the end."""

from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LONGEST = (
    "ui/test_browser.py",
    "training/test_selftest.py",
    "ui/test_subjects_in_browser.py",
    "training/test_resume.py",
    "training/test_processes.py",
    "docs/test_notebook.py",
    "extras/cluster/test_on_ray.py",
    "training/test_explain.py",
    "extras/cluster/test_fleet.py",
    "ui/test_train_form.py",
    "extras/serving/test_on_ray.py",
    "test_wheel.py",
    "extras/cluster/test_s3.py",
    "test_quick_start.py",
)
"""Files whose slow tests take half a minute or more, by `python -m pytest -m slow --durations=0`."""


def longest_first(items: list[pytest.Item]) -> None:
    """Sort the tests by file: those of `LONGEST`, then those of most tests, as pytest-xdist does. A file's own
    order stays."""
    rank = {TESTS / name: number for number, name in enumerate(LONGEST)}
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (rank.get(item.path, len(rank)), -counts[item.path]))
