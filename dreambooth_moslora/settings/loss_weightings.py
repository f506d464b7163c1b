"""The weightings of the loss by noise level, one row each; `training.objective` has the formulas.

`rules.EXCLUSIONS` says which of them exclude each other.
"""

from dataclasses import dataclass
from typing import Any

Config = Any  # Stands for `settings.train_config.TrainConfig`.


@dataclass(frozen=True)
class Weighting:
    """One weighting: for which bases it is, and the setting that asks for it.

    style: of the noise levels: `ddpm`, `edm` or `flow`
    setting: whose value asks for it; None for one that every base of the style has
    word: that value; without it any that is not empty or false
    parameters: settings whose values its formula takes after the noise levels
    spares_prior: whether the prior's images keep their weight
    """

    style: str
    setting: str | None = None
    word: str | None = None
    parameters: tuple[str, ...] = ()
    spares_prior: bool = False

    def is_active(self, config: Config, style: str) -> bool:
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
        # diffusers' script compares the prior's images without it
        spares_prior=True,
    ),
    "debiased": Weighting(
        style="ddpm",
        setting="debiased_estimation_loss",
        # kohya's trainer weighs them like the others
        spares_prior=False,
    ),
    "sigma_sqrt": Weighting(style="flow", setting="weighting_scheme", word="sigma_sqrt"),
    "cosmap": Weighting(style="flow", setting="weighting_scheme", word="cosmap"),
    "error_of_latents": Weighting(style="flow", setting="precondition_outputs"),
}
