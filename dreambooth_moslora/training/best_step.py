"""Best step of a run by its scores."""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_STALLED_EVALUATIONS = 3
"""Evaluations without a better score, after which it is said."""


@dataclass(frozen=True)
class BestStep:
    """Step with the best score, and how many evaluations came `since`."""

    step: int
    score: float
    since: int

    def describe_stall(self) -> str | None:
        """Return a line when the score has not risen for a while; None otherwise."""
        if self.since < MAX_STALLED_EVALUATIONS:
            return None
        return (
            f"the score has not risen for {self.since} evaluations; "
            f"best was {self.score:.3f} at step {self.step} (kept in best/)"
        )


def find_best_step(evaluations: Sequence[tuple[int, float]]) -> BestStep:
    """Return the best of (step, score) pairs; the earliest wins a tie. Raises ValueError when
    empty."""
    step, score = max(evaluations, key=lambda pair: (pair[1], -pair[0]))
    since = sum(later > step for later, _ in evaluations)
    return BestStep(step=step, score=score, since=since)
