"""The weightings of the loss by noise level, one row each; `training.objective` has the formulas.

Which settings exclude each other, and which are for UNets or for flows, follows from it.
"""

from dataclasses import dataclass
from typing import Any

Config = Any  # Stands for `settings.table.TrainConfig`, which imports the rules of this table.
EDM_SWITCH = "do_edm_style_training"
# What is refused, and why.
EDM_WEIGHS = "EDM weighs noise levels itself"
EACH_WEIGHS = "each weighs noise levels"


@dataclass(frozen=True)
class Weighting:
    """One weighting: for which bases it is, and the setting that asks for it.

    style: of the noise levels: `ddpm`, `edm` or `flow`
    setting: whose value asks for it; None for one that every base of the style has
    word: that value; without it any that is not empty or false
    parameters: settings whose values its formula takes after the noise levels
    stands_alone: whether no other of its style goes with it; else their product weighs
    spares_prior: whether the prior's images keep their weight
    """

    style: str
    setting: str | None = None
    word: str | None = None
    parameters: tuple[str, ...] = ()
    stands_alone: bool = False
    spares_prior: bool = False

    def is_asked_for(self, config: Config, style: str) -> bool:
        """Whether a run on a base of the style is weighed so."""
        if style != self.style:
            return False
        value = self.setting is None or getattr(config, self.setting)
        return value == self.word if self.word else bool(value)


# By the name of its formula, a function of `training.objective`.
WEIGHTINGS = {
    "error_of_noise": Weighting(style="edm"),
    "min_snr": Weighting(
        style="ddpm",
        setting="snr_gamma",
        parameters=("snr_gamma",),
        stands_alone=True,
        # diffusers' script compares the prior's images without it
        spares_prior=True,
    ),
    "debiased": Weighting(
        style="ddpm",
        setting="debiased_estimation_loss",
        stands_alone=True,
        # kohya's trainer weighs them like the others
        spares_prior=False,
    ),
    "sigma_sqrt": Weighting(style="flow", setting="weighting_scheme", word="sigma_sqrt"),
    "cosmap": Weighting(style="flow", setting="weighting_scheme", word="cosmap"),
    "error_of_latents": Weighting(style="flow", setting="precondition_outputs"),
}


def settings_of(style: str) -> tuple[str, ...]:
    """The settings that ask for weightings of a style, in the table's order."""
    found = [row.setting for row in WEIGHTINGS.values() if row.style == style and row.setting]
    return tuple(dict.fromkeys(found))


def words_of(setting: str) -> tuple[str, ...]:
    """The values of a setting that ask for weightings, in the table's order."""
    return tuple(row.word for row in WEIGHTINGS.values() if row.setting == setting and row.word)


def rivals_of(setting: str) -> tuple[str, ...]:
    """The settings of other weightings of its style, beside which a setting cannot stand: it stands
    alone, or they do."""
    own = [row for row in WEIGHTINGS.values() if row.setting == setting]
    styles = {row.style for row in own}
    is_alone = any(row.stands_alone for row in own)
    found = []
    for row in WEIGHTINGS.values():
        is_other = row.style in styles and row.setting and row.setting != setting
        if is_other and (is_alone or row.stands_alone):
            found.append(row.setting)
    return tuple(dict.fromkeys(found))


def exclusions() -> dict[str, dict[str, str]]:
    """Setting -> settings that a run cannot change beside it, and why; each pair once."""
    found: dict[str, dict[str, str]] = {}
    for setting in settings_of("ddpm"):
        reasons = {EDM_SWITCH: EDM_WEIGHS}
        for rival in rivals_of(setting):
            if rival not in found:
                reasons[rival] = EACH_WEIGHS
        found[setting] = reasons
    return found
