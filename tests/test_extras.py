"""The README's test command needs requirements.txt alone; what needs more says so."""

import re
from pathlib import Path

import pytest

from tests.conftest import pytest_runtest_setup

CI = (Path(__file__).parents[1] / ".ci" / "run").read_text(encoding="utf-8")


def test_a_test_is_skipped_where_its_extra_is_missing(request):
    request.node.add_marker(pytest.mark.extra("json", "no_such_module"))
    with pytest.raises(pytest.skip.Exception, match=r"^not installed: no_such_module$"):
        pytest_runtest_setup(request.node)


def test_the_fast_tier_runs_before_any_extra_is_installed_and_what_it_skipped_after_it():
    steps = re.findall(r"^(?:pip install|python -m pytest).*", CI, re.MULTILINE)
    assert steps[:2] == ["pip install -q --no-compile -r requirements.txt", "python -m pytest"]
    assert steps[2].startswith("pip install") and steps[3].startswith('python -m pytest -m "slow or extra"')
