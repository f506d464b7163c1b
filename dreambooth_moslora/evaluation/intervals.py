"""95 % intervals of means, by the bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13).

A score is a table with one axis per random factor: prompts × seeds, or subjects × seeds. All axes are resampled
at once, each as a whole (the crossed bootstrap of Owen, "The pigeonhole bootstrap", 2007): ten pictures of one
bad prompt do not count as ten independent ones.

Resampling a handful of items underestimates their spread: with six subjects nine intervals of ten hold the
truth, not nineteen of twenty. The interval is therefore widened to Student's t (the "expanded percentile
interval" of Hesterberg, "What teachers should know about the bootstrap", 2015), with Satterthwaite's degrees of
freedom (1946).
"""

from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np

__all__ = ["Interval", "bootstrap_mean"]

RESAMPLES = 4000
NORMAL = 1.960
DEGREES = np.array([1, 2, 3, 4, 5, 6, 8, 10, 15, 30, np.inf])
STUDENT = np.array([12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.306, 2.228, 2.131, 2.042, NORMAL])


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def to_dict(self, digits: int = 4) -> dict[str, float]:
        return {name: round(getattr(self, name), digits) for name in ("mean", "low", "high")}


def bootstrap_mean(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of a table of any number of axes, and its interval when every axis is resampled.

    An axis of length 1 shows no spread and adds nothing to the interval. Raises ValueError when empty or not
    finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"a mean needs finite values, not a table of shape {values.shape} with gaps")
    rng = np.random.default_rng(seed)
    counts = [rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in values.shape]
    axes = ascii_lowercase[: values.ndim]
    terms = ",".join(f"R{axis}" for axis in axes)
    means = np.einsum(f"{axes},{terms}->R", values, *counts, optimize=True) if counts else np.full(resamples, values)
    mean = values.mean()
    low, high = mean + widening(values) * (np.percentile(means, (2.5, 97.5)) - mean)
    return Interval(float(mean), float(low), float(high))


def widening(values: np.ndarray) -> float:
    """The factor that a percentile interval lacks for few items along each axis: at least 1, 1.44 for six subjects."""
    sizes = [(axis, n) for axis, n in enumerate(values.shape) if n > 1]
    others = [tuple(other for other in range(values.ndim) if other != axis) for axis, _ in sizes]
    variances = np.array([values.mean(axis=o).var(ddof=1) / n for o, (_, n) in zip(others, sizes)])
    if not variances.any():
        return 1.0
    counts = np.array([n for _, n in sizes])
    degrees = variances.sum() ** 2 / (variances**2 / (counts - 1)).sum()
    shown = (variances * (counts - 1) / counts).sum()
    return student(degrees) / NORMAL * float(np.sqrt(variances.sum() / shown))


def student(degrees: float) -> float:
    """The 97.5 % point of Student's t. Between tabulated degrees it errs to the wide side."""
    return float(np.interp(-1 / degrees, -1 / DEGREES, STUDENT))
