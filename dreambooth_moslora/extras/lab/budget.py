"""Find the rank at which each arm of a study has as many parameters as plain LoRA."""

from dataclasses import replace
from pathlib import Path

from dreambooth_moslora.extras.cluster.fleet import load_base_size
from dreambooth_moslora.extras.lab.study import Cell, Study
from dreambooth_moslora.plan.memory import count_adapter_parameters
from dreambooth_moslora.settings.train_config import TrainConfig


def choose_ranks(study: Study) -> dict[tuple[str, int], int]:
    """(arm, nominal rank) -> the rank that it trains at: see `Study.budget`."""
    real_ranks = {(arm, rank): rank for arm in study.arms for rank in study.ranks}
    if study.budget == "rank":
        return real_ranks
    for arm, rank in real_ranks:
        if not study.should_train(arm):
            continue
        cell = Cell(
            stage="test",
            arm=arm,
            rank=rank,
            subject=study.subjects[0].name,
            seed=0,
            learning_rate=1.0,
        )
        config = study.build_config(cell, rank, Path("unused"))

        # the budget: A and B of plain LoRA at the nominal rank
        budget = count_parameters(replace(config, mixer="none", rank_pattern=()), rank)

        # the ranks that the mixer can have
        step = 2 if config.mixer == "butterfly" else 1

        # the one that is nearest to the budget; the lower one at a tie
        gaps = {}
        for candidate_rank in range(step, rank + 1, step):
            gaps[candidate_rank] = abs(count_parameters(config, candidate_rank) - budget)
        real_ranks[arm, rank] = min(gaps, key=gaps.__getitem__)
    return real_ranks


def count_parameters(config: TrainConfig, rank: int) -> int:
    """Count the numbers of A, B and learnt mixers over all layers, each with its rank."""
    return count_adapter_parameters(replace(config, rank=rank), load_base_size(config))
