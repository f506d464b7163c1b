"""What the processes of a run do together: they share work, agree on what they find, and end together.

A process that raised alone would leave the others waiting. So each tells the others how its part of the work ended.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from dreambooth_moslora.core.errors import StopRequestedError, UserError, is_out_of_memory, one_line

__all__ = [
    "agreed",
    "any_process",
    "mean_over",
    "on_each",
    "on_main",
    "others_present",
    "share_of",
    "share_out",
    "told_by_each",
]

Item = TypeVar("Item")
Result = TypeVar("Result")
Processes = Accelerator | PartialState
"""Of a run, or of one that has no precision yet."""


def any_process(accelerator: Accelerator, said: bool) -> bool:
    """Whether any process says yes. All must call it, and all get the same answer."""
    if accelerator.num_processes == 1:
        return said
    votes = torch.tensor(float(said), device=accelerator.device)
    with others_present():
        return bool(accelerator.reduce(votes, "sum") > 0)


def mean_over(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The mean of the processes' `values`, of one shape. All must call it. Raises UserError when a process has gone."""
    if accelerator.num_processes == 1:
        return values
    with others_present():
        return accelerator.reduce(values, "mean")


def on_main(accelerator: Processes, work: Callable[[], Result]) -> Result:
    """Do `work` on the main process; all processes get its result, which must be small and picklable.

    An error or stop there is raised on all processes.
    """
    if accelerator.num_processes == 1:
        return work()
    result, error = attempt(work) if accelerator.is_main_process else (None, None)
    told = [(result, Ending.of(error))]
    with others_present():
        broadcast_object_list(told)
    if error is not None:
        raise error
    result, ending = told[0]
    if ending is not None:
        raise ending.heard_from(0)
    return result


def on_each(accelerator: Processes, work: Callable[[], Result]) -> Result:
    """Do `work` on each process, which gets its own result. An error or stop of one is raised on all."""
    result, error = attempt(work)
    exchange(accelerator, [], error)
    return result


def told_by_each(accelerator: Processes, own: Item) -> list[Item]:
    """The picklable `own` of each process, in their order. All must call it."""
    return exchange(accelerator, [own], None)


def share_out(
    accelerator: Accelerator, items: Sequence[Item], work: Callable[[Sequence[Item]], Generator[Result, None, None]]
) -> Iterator[Result]:
    """The results of `items`, in their order, on all processes. Of n processes, each works on every n-th item.

    `work` yields one picklable result for each item that it is given. The processes exchange results after each
    item: an error or stop of one is then raised on all. All processes must have equal `items`.
    """
    with closing(work(share_of(accelerator, items))) as own:
        for first in range(0, len(items), accelerator.num_processes):
            has_one = first + accelerator.process_index < len(items)
            result, error = attempt(lambda: next(own)) if has_one else (None, None)
            yield from exchange(accelerator, [result] if has_one else [], error)


def share_of(accelerator: Accelerator, items: Sequence[Item]) -> Sequence[Item]:
    """What this process works on in `share_out`."""
    return items[accelerator.process_index :: accelerator.num_processes]


def agreed(
    accelerator: Processes,
    find: Callable[[], Result],
    words: Callable[[Result], str],
    remedy: str = "the photos, --class_data_dir and --output_dir must be on a disk that all machines share.",
) -> Result:
    """What each process finds by itself, in `words` the same as on the main process.

    Raises UserError on all processes where one finds something else, as they would train different adapters or wait
    for one that is gone: it names the lines of `words` that differ, and the `remedy`. An error of `find` in one process
    is raised on all.
    """
    if accelerator.num_processes == 1:
        return find()
    found, error = attempt(find)
    told = exchange(accelerator, [] if error else [words(found)], error)
    other = next((number for number, said in enumerate(told) if said != told[0]), None)
    if other is not None:
        theirs, ours = lines_without(told[0], told[other]), lines_without(told[other], told[0])
        raise UserError(f"process {other} has {theirs}, and the main process {ours}: {remedy}")
    return found


def lines_without(others: str, own: str) -> str:
    """The lines of `own` that are not in `others`, as one."""
    return ", ".join(line for line in own.splitlines() if line not in others.splitlines())


class Ending(NamedTuple):
    """How the work of a process ended before its time: with an error of this `text`, or by a stop."""

    is_stop: bool
    text: str

    @classmethod
    def of(cls, error: Exception | None) -> "Ending | None":
        return None if error is None else cls(isinstance(error, StopRequestedError), str(error) or type(error).__name__)

    def heard_from(self, process: int) -> Exception:
        """The error to raise on the other processes."""
        if self.is_stop:
            return StopRequestedError()
        return UserError(f"{f'process {process}' if process else 'the main process'} ended: {self.text}")


def attempt(work: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """The result, or the error."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def exchange(accelerator: Processes, own: list[Result], error: Exception | None) -> list[Result]:
    """The results of all processes, in their order. If one has an `error`, it is raised on all; an error is more than
    a stop, and each process raises its own."""
    ending = Ending.of(error)
    told = [(own, ending)]
    if accelerator.num_processes > 1:
        with others_present():
            told = gather_object(told)
    endings = [(process, ended) for process, (_, ended) in enumerate(told) if ended is not None]
    if not endings:
        return [result for results, _ in told for result in results]
    process, worst = min(endings, key=lambda found: found[1].is_stop)
    raise error if ending is not None and ending.is_stop == worst.is_stop else worst.heard_from(process)


@contextmanager
def others_present() -> Iterator[None]:
    """Within it the processes exchange values. Raises UserError when one has gone, as when it was killed."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"another process of this run has gone ({one_line(error, 100)}): its own last line says why. "
            "start again, with --resume_from_checkpoint latest if it had a checkpoint."
        ) from error
