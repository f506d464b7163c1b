"""What a published file tells of its run's settings."""

from dreambooth_moslora.settings.sources import RECIPE, TOLD_IF_CHANGED, recipe_of
from dreambooth_moslora.settings.table import TrainConfig


def test_later_settings_are_told_only_where_they_were_changed():
    """So the file of a run without them keeps the bytes that it had before there were any."""
    assert set(recipe_of(TrainConfig())) <= set(RECIPE) and not set(RECIPE) & set(TOLD_IF_CHANGED)
    told = recipe_of(TrainConfig(noise_offset=0.1, use_ema=True))
    assert {name: told[name] for name in TOLD_IF_CHANGED if name in told} == {"noise_offset": 0.1, "use_ema": True}
