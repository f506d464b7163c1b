"""What the page offers at its start, before the base is loaded."""

import pytest

from dreambooth_moslora.core import TOY_TEMPLATES
from dreambooth_moslora.settings.prompts import DREAMBOOTH_LIVE_TEMPLATES
from dreambooth_moslora.ui.app import templates_for


@pytest.mark.parametrize("base, templates", [("toy", TOY_TEMPLATES), ("some/sdxl", DREAMBOOTH_LIVE_TEMPLATES)])
def test_the_prompts_suit_the_base(base, templates):
    assert set(templates) <= set(templates_for(base))
