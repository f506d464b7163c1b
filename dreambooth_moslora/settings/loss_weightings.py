"""Weightings of the loss by noise level, one row each; `training.objective` has the formulas.

The rows of the settings say which of them exclude each other.
"""

from dataclasses import dataclass
from typing import Any

Config = Any
"""Stands for `settings.train_config.TrainConfig`."""


@dataclass(frozen=True)
class Weighting:
    """Weighting of the loss: its bases, and the setting that enables it.

    style: of the noise levels: `ddpm`, `edm` or `flow`
    setting: enables it; None for one that every base of the style has
    word: value of that setting; without it any that is not empty or false
    parameters: settings whose values its formula takes after the noise levels
    spares_prior: whether the prior's images keep their weight
    """

    style: str
    setting: str | None = None
    word: str | None = None
    parameters: tuple[str, ...] = ()
    spares_prior: bool = False

    def is_active(self, config: Config, style: str) -> bool:
        """Return whether a run on a base of the style uses this weighting."""
        if style != self.style:
            return False
        value = self.setting is None or getattr(config, self.setting)
        return value == self.word if self.word else bool(value)


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
"""By the name of the formula, a function of `training.objective`."""
