"""What several tests of training begin with."""

from pathlib import Path

import pytest

from tests.helpers.tiny import save_tiny_sdxl
from tests.helpers.tiny_training import paint_photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return paint_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base of its own, whose tokenizers get new words."""
    return save_tiny_sdxl(tmp_path_factory.mktemp("base"))
