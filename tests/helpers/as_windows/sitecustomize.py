"""Python imports it where this folder is in PYTHONPATH: the process gets the answers of
`tests/helpers/windows.py`."""

import pytest

from tests.helpers.windows import answer_as_windows

answer_as_windows(pytest.MonkeyPatch())
