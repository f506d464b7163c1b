"""The cells of a study as tasks of a cluster (`compare --ray_address`). They write the same result files as
without Ray."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreambooth_moslora.evaluation.studies.run import run_cell
from dreambooth_moslora.evaluation.studies.study import Cell, Study
from dreambooth_moslora.fleet.cluster import Lost, Task, room_for, run_tasks
from dreambooth_moslora.fleet.sizing import Machines

__all__ = ["CellRunner"]


@dataclass(frozen=True)
class CellRunner:
    """Replaces `studies.run.run_cells`: runs as many cells at once as the `machines` hold, or at most `jobs`.

    A worker calls `run` for each cell.
    """

    machines: Machines
    jobs: int | None = None
    run: Callable = run_cell

    def __call__(
        self, study: Study, cells: Sequence[Cell], ranks: Mapping[tuple[str, int], int], out: Path, _jobs: int
    ) -> Iterator[tuple[Cell, float, str]]:
        started, tasks = time.monotonic(), self.tasks(study, cells, ranks, out)
        for task, result in run_tasks(in_folder, tasks, window=self.jobs):
            yield (task.key, time.monotonic() - started, result.reason) if isinstance(result, Lost) else result

    def tasks(self, study: Study, cells: Sequence[Cell], ranks: Mapping, out: Path) -> Iterator[Task]:
        for cell in cells:
            rank = ranks[cell.arm, cell.rank]
            needs = self.machines.resources_for(study.config_of(cell, rank, out))
            jobs = self.jobs or min(len(cells), room_for(needs))
            yield Task(cell, (os.getcwd(), self.run, study, cell, rank, out, jobs), needs)


def in_folder(folder: str, run: Callable, *arguments: object) -> tuple[Cell, float, str]:
    """A study's paths are relative to the folder of the command, which must exist at the same place on all machines."""
    os.chdir(folder)
    return run(*arguments)
