"""Threads that stand for the processes of a run: they exchange values as processes do."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, local
from types import SimpleNamespace

import pytest

PATIENCE_S = 20


def as_processes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list]:
    """Returns a function: it does `work(accelerator)` in `count` processes, `on_machine` of which
    share a machine, and returns the result or the error of each."""
    here = local()

    def gather(own: list) -> list:
        here.wire[here.process] = own
        here.barrier.wait(PATIENCE_S)
        told = [one for process in sorted(here.wire) for one in here.wire[process]]
        here.barrier.wait(PATIENCE_S)
        return told

    monkeypatch.setattr("accelerate.utils.gather_object", gather)

    def run(count: int, work: Callable, on_machine: int | None = None) -> list:
        wire, barrier = {}, Barrier(count)

        def one(process: int) -> object:
            here.process, here.wire, here.barrier = process, wire, barrier
            accelerator = SimpleNamespace(
                num_processes=count,
                process_index=process,
                is_main_process=process == 0,
                is_local_main_process=process % (on_machine or count) == 0,
            )
            try:
                return work(accelerator)
            except Exception as error:
                return error

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(one, range(count)))

    return run
