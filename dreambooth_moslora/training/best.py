"""The best step of a run, and the best scale of its adapter, by their scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STALLED_AFTER = 3
"""Evaluations without a better score, after which early stopping is suggested."""


@dataclass(frozen=True)
class BestStep:
    """The step with the best score, and how many evaluations came `since`."""

    step: int
    score: float
    since: int

    def advice(self, early_stopping: int | None) -> str | None:
        """One line when the score has not risen for a while; None otherwise."""
        if self.since < (early_stopping or STALLED_AFTER):
            return None
        line = (
            f"the score has not risen for {self.since} evaluations; "
            f"best was {self.score:.3f} at step {self.step}"
        )
        if early_stopping:
            return f"{line}: stopping early, as --early_stopping {early_stopping} asks"
        return f"{line} (kept in best/); --early_stopping {STALLED_AFTER} would stop here"


def best_of(evaluations: Sequence[tuple[int, float]]) -> BestStep:
    """The best of (step, score) pairs; the earliest wins a tie. Raises ValueError when empty."""
    step, score = max(evaluations, key=lambda pair: (pair[1], -pair[0]))
    since = sum(later > step for later, _ in evaluations)
    return BestStep(step=step, score=score, since=since)


SCALES = (0.4, 0.6, 0.8, 1.0, 1.2)
"""Those that are tried. Training uses 1; smaller ones hardly show the subject, larger ones burn."""
EQUAL = 0.99
"""Scores of at least this fraction of the best count as equal; the scale nearest to 1 wins."""
USABLE = 0.95
"""Scales of at least this fraction of the best score are usable."""


@dataclass(frozen=True)
class ScaleChoice:
    """The best scale of an adapter.

    best: the scale
    low, high: the ends of the usable scales
    scores: scale -> score, which decided
    """

    best: float
    low: float
    high: float
    scores: dict[float, float]


def choose_scale(scores: Mapping[float, float]) -> ScaleChoice | None:
    """Choose from scale -> score. None when no scale shows the subject."""
    highest = max(scores.values())
    if highest <= 0:
        return None
    equal = [scale for scale in scores if scores[scale] >= EQUAL * highest]
    best = min(equal, key=lambda scale: abs(scale - 1))

    # Usable is what lies without a gap beside it: first up, then down.
    usable = [best]
    scales = sorted(scores)
    place = scales.index(best)
    for side in (scales[place + 1 :], scales[:place][::-1]):
        for scale in side:
            if scores[scale] < USABLE * highest:
                break
            usable.append(scale)
    return ScaleChoice(
        best=best,
        low=min(usable),
        high=max(usable),
        scores=dict(sorted(scores.items())),
    )
