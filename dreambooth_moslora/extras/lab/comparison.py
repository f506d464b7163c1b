"""Compare the cells of a study: learning rates, intervals of each arm, and differences.

Two arms share subject, seed, photos, noise, prompts and the noise of every picture. Differences are
taken pair by pair, and resampled over subjects and seeds (`metrics.bootstrap_mean`). Win/tie/loss
has the form of the MoSLoRA paper's human study (arXiv 2406.11909, section 4.3), with DINO and
CLIP-T instead of people.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from dreambooth_moslora.evaluation import metrics, reference_arms
from dreambooth_moslora.extras.lab.study import Cell, Study
from dreambooth_moslora.settings import metric_kinds


def list_study_measures() -> list[str]:
    """List the measures that a study compares."""
    return [name for name, row in metric_kinds.METRICS.items() if row.study]


def list_image_measures() -> list[str]:
    """List the measures by which a picture can win against another."""
    return [name for name, row in metric_kinds.METRICS.items() if row.pictures]


Score = float | int | bool | None
"""A number; whether there is an alarm; None where a measure has no value."""


@dataclass(frozen=True)
class CellResult:
    """Result of a finished cell.

    scores: means, by measure
    pictures: values (prompts × seeds,) of each picture, by those `judged`
    cost: seconds, memory and parameters, see `train_cell`
    """

    cell: Cell
    scores: dict[str, Score]
    pictures: dict[str, list[Score]]
    cost: dict[str, Score]


@dataclass(frozen=True)
class ArmSummary:
    """Summary of one arm at one rank over all test subjects and seeds.

    scores: means with intervals, by measure
    cost: medians
    """

    arm: str
    rank: int
    learning_rate: float
    scores: dict[str, metrics.Interval]
    cost: dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """Comparison of one arm with the reference at one rank.

    differences: of scores, paired, by measure
    wins: fractions of pictures that win, tie and lose, by measure
    """

    arm: str
    rank: int
    differences: dict[str, metrics.Interval]
    wins: dict[str, tuple[float, float, float]]


def choose_best_rates(study: Study, results: Sequence[CellResult]) -> dict[tuple[str, int], float]:
    """(arm, rank) -> the learning rate with the highest mean score on the tuning subjects; the
    lower one at a tie."""
    best = study.get_first_rates()
    for key, curve in build_rate_curves(study, results).items():
        best[key] = max(sorted(curve), key=curve.__getitem__)
    return best


def build_rate_curves(
    study: Study, results: Sequence[CellResult]
) -> dict[tuple[str, int], dict[float, float]]:
    """(arm, rank) -> learning rate -> mean score, for rates with a score on all tuning subjects."""
    tuning_scores: dict = defaultdict(lambda: defaultdict(list))
    for result in results:
        cell = result.cell
        score = result.scores.get("score")
        if cell.stage == "tune" and score is not None:
            tuning_scores[cell.arm, cell.rank][cell.learning_rate].append(score)

    # a rate whose training failed on a subject, or whose style has no score, has too few scores,
    # and is left out
    curves: dict = defaultdict(dict)
    for key, by_rate in tuning_scores.items():
        for rate, scores in by_rate.items():
            if len(scores) == len(study.tuning_subjects):
                curves[key][rate] = float(np.mean(scores))
    return dict(curves)


def list_seeds(results: Sequence[CellResult]) -> list[int]:
    """List the seeds of the comparison."""
    return sorted({r.cell.seed for r in results if r.cell.stage == "test"})


def filter_whole_seeds(results: Sequence[CellResult]) -> list[CellResult]:
    """Return the results without seeds that have fewer cells than others: one still running would
    make each arm incomplete."""
    counts = Counter(r.cell.seed for r in results if r.cell.stage == "test")
    most = max(counts.values(), default=0)
    return [r for r in results if r.cell.stage == "tune" or counts[r.cell.seed] == most]


def build_tables(
    results: Sequence[CellResult], get_value: Callable[[CellResult], Any]
) -> dict[tuple[str, int], np.ndarray]:
    """Build a table (subjects, seeds, …) of `get_value` for each (arm, rank) whose table is
    complete."""
    tested = [r for r in results if r.cell.stage == "test" and get_value(r) is not None]
    subjects = sorted({r.cell.subject for r in tested})
    seeds = sorted({r.cell.seed for r in tested})

    # the cells of each arm and rank
    arm_values: dict = defaultdict(dict)
    for r in tested:
        arm_values[r.cell.arm, r.cell.rank][r.cell.subject, r.cell.seed] = get_value(r)

    # the tables without a gap, so that any two can be compared pair by pair
    tables = {}
    for key, cell_values in arm_values.items():
        if len(cell_values) < len(subjects) * len(seeds):
            continue
        table = np.array([[cell_values[subject, seed] for seed in seeds] for subject in subjects])
        if np.isfinite(table).all():
            tables[key] = table
    return tables


def build_score_tables(
    results: Sequence[CellResult],
) -> dict[str, dict[tuple[str, int], np.ndarray]]:
    """Measure -> (arm, rank) -> scores (subjects, seeds)."""
    return {
        name: build_tables(results, lambda r, name=name: r.scores.get(name))
        for name in list_study_measures()
    }


def build_image_tables(
    results: Sequence[CellResult],
) -> dict[str, dict[tuple[str, int], np.ndarray]]:
    """Measure -> (arm, rank) -> values of pictures (subjects, seeds, pictures)."""
    return {
        name: build_tables(results, lambda r, name=name: r.pictures[name])
        for name in list_image_measures()
    }


def summarize_arms(results: Sequence[CellResult]) -> list[ArmSummary]:
    """Every arm and rank whose cells are complete."""
    by_measure = build_score_tables(results)
    summaries = []
    for arm, rank in by_measure["score"]:
        # intervals of what was measured on all cells; of seconds and memory the median
        arm_results = [
            r for r in results if (r.cell.stage, r.cell.arm, r.cell.rank) == ("test", arm, rank)
        ]
        scores = {}
        for measure, table in by_measure.items():
            if (arm, rank) in table:
                scores[measure] = metrics.bootstrap_mean(table[arm, rank])
        summaries.append(
            ArmSummary(
                arm=arm,
                rank=rank,
                learning_rate=arm_results[0].cell.learning_rate,
                scores=scores,
                cost={
                    name: float(np.median([r.cost[name] for r in arm_results]))
                    for name in arm_results[0].cost
                },
            )
        )
    return summaries


def compare_arms(study: Study, results: Sequence[CellResult]) -> list[Outcome]:
    """Each arm against the reference, at each rank where both are complete."""
    by_measure = build_score_tables(results)
    pictures = build_image_tables(results)
    outcomes = []
    for arm, rank in by_measure["score"]:
        ours = (arm, rank)
        reference = (study.reference, rank)
        if ours == reference or reference not in by_measure["score"]:
            continue

        # scores, pair by pair of equal subject and seed
        differences = {}
        for measure, table in by_measure.items():
            if ours in table and reference in table:
                differences[measure] = metrics.bootstrap_mean(table[ours] - table[reference])

        # pictures, pair by pair of equal subject, seed, prompt and noise
        wins = {}
        for measure, table in pictures.items():
            difference = table[ours] - table[reference]
            margin = study.tie * table[reference].std()
            signs = np.where(np.abs(difference) < margin, 0, np.sign(difference))
            wins[measure] = tuple(float((signs == sign).mean()) for sign in (1, 0, -1))
        outcomes.append(Outcome(arm=arm, rank=rank, differences=differences, wins=wins))
    return outcomes


def compare_references(
    study: Study, results: Sequence[CellResult]
) -> dict[str, reference_arms.TrainingVerdict]:
    """Name -> whether an arm was worth its training, beside each arm that draws by references.
    Differences are resampled over subjects, seeds, prompts and the seeds of pictures."""
    pictures = build_image_tables(results)

    def reshape_tables(arm: str, rank: int) -> dict[str, np.ndarray]:
        tables = {}
        for name, arm_tables in pictures.items():
            table = arm_tables[arm, rank]
            tables[name] = table.reshape(*table.shape[:2], -1, study.protocol.images_per_prompt)
        return tables

    # at each rank where both are complete
    verdicts = {}
    complete = pictures["dino"].keys()
    for (arm, rank), reference_arm in product(complete, study.arms):
        if (
            study.should_train(arm)
            and not study.should_train(reference_arm)
            and (reference_arm, rank) in complete
        ):
            verdict = reference_arms.compare_tables(
                reshape_tables(arm, rank), reshape_tables(reference_arm, rank)
            )
            verdicts[f"{arm} r{rank} against {reference_arm}"] = verdict
    return verdicts
