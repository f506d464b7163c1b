"""What the table of weightings says of the settings that ask for them."""

from dreambooth_moslora.settings import weightings
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.settings.weightings import WEIGHTINGS, Weighting


def test_a_new_row_is_excluded_by_those_that_stand_alone_and_needs_no_other_edit(monkeypatch):
    """Also one whose product with others may weigh: each of the others says that none goes with
    it."""
    monkeypatch.setitem(WEIGHTINGS, "p2", Weighting(style="ddpm", setting="p2_gamma"))
    assert weightings.rivals_of("p2_gamma") == ("snr_gamma", "debiased_estimation_loss")
    assert weightings.rivals_of("snr_gamma") == ("debiased_estimation_loss", "p2_gamma")
    each = weightings.EACH_WEIGHS
    assert weightings.exclusions() == {
        "snr_gamma": {
            weightings.EDM_SWITCH: weightings.EDM_WEIGHS,
            "debiased_estimation_loss": each,
            "p2_gamma": each,
        },
        "debiased_estimation_loss": {
            weightings.EDM_SWITCH: weightings.EDM_WEIGHS,
            "p2_gamma": each,
        },
        "p2_gamma": {weightings.EDM_SWITCH: weightings.EDM_WEIGHS},
    }


def test_words_that_ask_for_a_weighting_are_choices_of_their_setting():
    assert weightings.words_of("weighting_scheme") == ("sigma_sqrt", "cosmap")
    for word in weightings.words_of("weighting_scheme"):
        TrainConfig(weighting_scheme=word)
