"""The best evaluated step so far, and advice or a stop when the score no longer rises."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CURVES", "BestStep", "best_of"]

CURVES = {"dino": "subject", "clip_t": "prompt", "copied": "copies", "score": "score"}
"""Measures of the score, and the score: name -> label on a plot of the run, short enough for a phone."""

STALLED_AFTER = 3
"""Evaluations without a better score, after which early stopping is suggested."""


@dataclass(frozen=True)
class BestStep:
    """The best evaluation so far; `since` counts the evaluations after it."""

    step: int
    score: float
    since: int

    def advice(self, early_stopping: int | None) -> str | None:
        """One line when the score has not risen for a while; None otherwise."""
        if self.since < (early_stopping or STALLED_AFTER):
            return None
        line = f"the score has not risen for {self.since} evaluations; best was {self.score:.3f} at step {self.step}"
        if early_stopping:
            return f"{line}: stopping early, as --early_stopping {early_stopping} asks"
        return f"{line} (kept in best/); --early_stopping {STALLED_AFTER} would stop here"

    def should_stop(self, early_stopping: int | None) -> bool:
        """Whether early stopping is on and its patience is over."""
        return early_stopping is not None and self.since >= early_stopping


def best_of(evaluations: Sequence[tuple[int, float]]) -> BestStep:
    """The best of (step, score) pairs; the earliest wins a tie. Raises ValueError when empty."""
    step, score = max(evaluations, key=lambda pair: (pair[1], -pair[0]))
    return BestStep(step, score, sum(later > step for later, _ in evaluations))
