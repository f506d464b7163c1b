"""95 % intervals of means, by the bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13).

A score is a table with an axis for each thing that was drawn at random: prompts × seeds, or subjects × seeds. All axes
are resampled at once, each as a whole (the crossed bootstrap of Owen, "The pigeonhole bootstrap", 2007): ten
pictures of one bad prompt do not count as ten independent ones. A little conservative, never the other way.
"""

from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np

__all__ = ["Interval", "bootstrap_mean"]

RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def to_dict(self, digits: int = 4) -> dict[str, float]:
        return {name: round(getattr(self, name), digits) for name in ("mean", "low", "high")}

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def bootstrap_mean(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of a table of any number of axes, and its percentile interval when every axis is resampled.

    An axis of length 1 says nothing about its own spread: it adds nothing to the interval. Raises ValueError when empty
    or not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"a mean needs finite values, not a table of shape {values.shape} with gaps")
    rng = np.random.default_rng(seed)
    counts = [rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in values.shape]
    axes = ascii_lowercase[: values.ndim]
    terms = ",".join(f"R{axis}" for axis in axes)
    means = np.einsum(f"{axes},{terms}->R", values, *counts, optimize=True) if counts else np.full(resamples, values)
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(values.mean()), float(low), float(high))
