"""Chooses the best scale of a finished adapter, and the range of scales whose score stays near it."""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["SCALES", "ScaleChoice", "choose_scale"]

SCALES = (0.4, 0.6, 0.8, 1.0, 1.2)
"""Smaller scales hardly show the subject; larger ones burn the pictures. 1 is the scale of training."""
EQUAL = 0.99
"""Scores of at least this fraction of the best count as equal; the scale nearest to 1 wins."""
USABLE = 0.95
"""Scales of at least this fraction of the best score are usable, to keep more of the prompt or of the subject."""


@dataclass(frozen=True)
class ScaleChoice:
    """The `best` scale, the usable range around it, and the `scores` (scale -> score) that decided."""

    best: float
    low: float
    high: float
    scores: dict[float, float]

    def sentence(self) -> str:
        around = f"usable from {self.low:g} to {self.high:g}" if self.low < self.high else "no other comes near it"
        tried = ", ".join(f"{scale:g}: {score:.3f}" for scale, score in self.scores.items())
        return f"the adapter's best scale is {self.best:g}, {around} (scores {tried})"


def choose_scale(scores: Mapping[float, float]) -> ScaleChoice | None:
    """Choose from scale -> score. None when no scale shows the subject."""
    highest = max(scores.values())
    if highest <= 0:
        return None
    best = min((s for s in scores if scores[s] >= EQUAL * highest), key=lambda s: abs(s - 1))
    usable, scales = [best], sorted(scores)
    place = scales.index(best)
    for side in (scales[place + 1 :], scales[:place][::-1]):  # up, and down
        for scale in side:
            if scores[scale] < USABLE * highest:
                break
            usable.append(scale)
    return ScaleChoice(best, min(usable), max(usable), dict(sorted(scores.items())))
