"""The best step of a run, by its scores."""

from collections.abc import Sequence
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
