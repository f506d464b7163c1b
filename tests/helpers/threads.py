"""Threads that stand for the processes of a run: they exchange values as processes do."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, local
from types import SimpleNamespace

import pytest

PATIENCE_S = 20


def as_processes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list]:
    """Return a function: it does `work(accelerator)` in `count` processes, `on_machine` of which
    share a machine, and returns the result or the error of each."""
    thread = local()

    def gather(values: list) -> list:
        thread.wire[thread.process] = values
        thread.barrier.wait(PATIENCE_S)
        gathered = [value for process in sorted(thread.wire) for value in thread.wire[process]]
        thread.barrier.wait(PATIENCE_S)
        return gathered

    monkeypatch.setattr("accelerate.utils.gather_object", gather)

    def run(count: int, work: Callable, on_machine: int | None = None) -> list:
        wire, barrier = {}, Barrier(count)

        def run_process(rank: int) -> object:
            thread.process, thread.wire, thread.barrier = rank, wire, barrier
            accelerator = SimpleNamespace(
                num_processes=count,
                process_index=rank,
                is_main_process=rank == 0,
                is_local_main_process=rank % (on_machine or count) == 0,
            )
            try:
                return work(accelerator)
            except Exception as error:
                return error

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(run_process, range(count)))

    return run
