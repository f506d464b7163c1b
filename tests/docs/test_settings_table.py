"""The list of all settings in the docs is the one that their table gives."""

from dreambooth_moslora.settings.table import SETTINGS
from tools.settings_table import OUT, page


def test_the_page_lists_each_setting_once_and_is_up_to_date():
    text = OUT.read_text(encoding="utf-8")
    assert text == page(), "run: python -m tools.settings_table"
    assert [text.count(f"| `--{name}` |") for name in SETTINGS] == [1] * len(SETTINGS)
