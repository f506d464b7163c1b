"""Statistics of a comparison: means of each arm, paired differences to the reference, wins, ties and losses.

Two arms share subject, seed, photos, noise, prompts and the noise of every picture. Differences are taken pair
by pair, and resampled over subjects and seeds (`metrics.bootstrap_mean`). Win/tie/loss has the form of the
MoSLoRA paper's human study (arXiv 2406.11909, section 4.3), with DINO and CLIP-T instead of people.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dreambooth_moslora.evaluation.metrics import Interval, bootstrap_mean
from dreambooth_moslora.extras.lab.study import Cell, Study
from dreambooth_moslora.settings.measures import MEASURES


def studied() -> list[str]:
    """The measures that are compared."""
    return [name for name, row in MEASURES.items() if row.study]


def judged() -> list[str]:
    """The measures by which single pictures are compared."""
    return [name for name, row in MEASURES.items() if row.pictures]


@dataclass(frozen=True)
class Result:
    """A finished cell: `scores` are means, `pictures` per-picture values (prompts × seeds,) of those `judged`."""

    cell: Cell
    scores: dict[str, float]
    pictures: dict[str, list[float]]
    cost: dict[str, float]


@dataclass(frozen=True)
class ArmSummary:
    """One arm at one rank over all test subjects and seeds."""

    arm: str
    rank: int
    learning_rate: float
    scores: dict[str, Interval]
    cost: dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """One arm against the reference at one rank: paired differences, and win/tie/loss fractions by measure."""

    arm: str
    rank: int
    differences: dict[str, Interval]
    wins: dict[str, tuple[float, float, float]]


def best_rates(study: Study, results: Sequence[Result]) -> dict[tuple[str, int], float]:
    """(arm, rank) -> the learning rate with the highest mean score on the tuning subjects; the lower one at a tie."""
    best = study.first_rates()
    for key, curve in rate_curves(study, results).items():
        best[key] = max(sorted(curve), key=curve.__getitem__)
    return best


def rate_curves(study: Study, results: Sequence[Result]) -> dict[tuple[str, int], dict[float, float]]:
    """(arm, rank) -> learning rate -> mean score, for rates with a score on all tuning subjects."""
    found: dict = defaultdict(lambda: defaultdict(list))
    for result in results:
        if result.cell.stage == "tune":
            found[result.cell.arm, result.cell.rank][result.cell.learning_rate].append(result.scores["score"])
    curves = {}
    for key, by_rate in found.items():
        whole = {rate: scores for rate, scores in by_rate.items() if len(scores) == len(study.tuning_subjects)}
        if whole:
            curves[key] = {rate: float(np.mean(scores)) for rate, scores in whole.items()}
    return curves


def is_tuned(study: Study, results: Sequence[Result]) -> bool:
    """Whether every arm and rank with several rates has at least one to choose."""
    cells = {(cell.arm, cell.rank) for cell in study.tuning_cells()}
    return cells <= rate_curves(study, results).keys()


def seeds_of(results: Sequence[Result]) -> list[int]:
    return sorted({r.cell.seed for r in results if r.cell.stage == "test"})


def of_whole_seeds(results: Sequence[Result]) -> list[Result]:
    """The results without seeds that have fewer cells than others: a seed that is still running would make
    every arm incomplete."""
    counts = Counter(r.cell.seed for r in results if r.cell.stage == "test")
    most = max(counts.values(), default=0)
    return [r for r in results if r.cell.stage == "tune" or counts[r.cell.seed] == most]


def tables(results: Sequence[Result], measure: str) -> dict[tuple[str, int], np.ndarray]:
    """(arm, rank) -> values (subjects, seeds), for the arms whose table is complete."""
    tested = [r for r in results if r.cell.stage == "test" and measure in r.scores]
    subjects, seeds = (sorted({getattr(r.cell, name) for r in tested}) for name in ("subject", "seed"))
    found = {(r.cell.arm, r.cell.rank): np.full((len(subjects), len(seeds)), np.nan) for r in tested}
    for r in tested:
        found[r.cell.arm, r.cell.rank][subjects.index(r.cell.subject), seeds.index(r.cell.seed)] = r.scores[measure]
    return {key: table for key, table in found.items() if np.isfinite(table).all()}


def summaries(results: Sequence[Result]) -> list[ArmSummary]:
    """Every arm and rank whose cells are complete."""
    by_measure = {measure: tables(results, measure) for measure in studied()}
    found = []
    for arm, rank in by_measure["score"]:
        own = results_of(results, arm, rank)
        scores = {m: bootstrap_mean(t[arm, rank]) for m, t in by_measure.items() if (arm, rank) in t}
        cost = {name: float(np.median([r.cost[name] for r in own])) for name in own[0].cost}
        found.append(ArmSummary(arm, rank, own[0].cell.learning_rate, scores, cost))
    return found


def outcomes(study: Study, results: Sequence[Result]) -> list[Outcome]:
    """Each arm against the reference, at each rank where both are complete."""
    by_measure = {measure: tables(results, measure) for measure in studied()}
    found = []
    for arm, rank in by_measure["score"]:
        reference = (study.reference, rank)
        if arm == study.reference or reference not in by_measure["score"]:
            continue
        differences = {
            measure: bootstrap_mean(t[arm, rank] - t[reference])
            for measure, t in by_measure.items()
            if (arm, rank) in t and reference in t
        }
        wins = {measure: shares_of(duels(study, results, arm, rank, measure)) for measure in judged()}
        found.append(Outcome(arm, rank, differences, wins))
    return found


def results_of(results: Sequence[Result], arm: str, rank: int) -> list[Result]:
    """Results of one arm at one rank in the comparison."""
    return [r for r in results if (r.cell.stage, r.cell.arm, r.cell.rank) == ("test", arm, rank)]


def shares_of(signs: np.ndarray) -> tuple[float, float, float]:
    """Fractions of 1, 0 and -1: won, tied, lost."""
    won, tied, lost = (float((signs == sign).mean()) for sign in (1, 0, -1))
    return won, tied, lost


def duels(study: Study, results: Sequence[Result], arm: str, rank: int, measure: str) -> np.ndarray:
    """1, 0 or -1 for each pair of pictures of equal subject, seed, prompt and noise: (subjects, seeds, pictures)."""
    ours, theirs = (pictures(results, name, rank, measure) for name in (arm, study.reference))
    difference, margin = ours - theirs, study.tie * theirs.std()
    return np.where(np.abs(difference) < margin, 0, np.sign(difference)).astype(int)


def pictures(results: Sequence[Result], arm: str, rank: int, measure: str) -> np.ndarray:
    """Scores of the pictures of one arm at one rank, (subjects, seeds, pictures)."""
    own = {(r.cell.subject, r.cell.seed): r.pictures[measure] for r in results_of(results, arm, rank)}
    subjects, seeds = (sorted({key[axis] for key in own}) for axis in (0, 1))
    return np.array([[own[subject, seed] for seed in seeds] for subject in subjects])
