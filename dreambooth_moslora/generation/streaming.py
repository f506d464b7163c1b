"""Turns a function with callbacks into an iterator, so that slow work can be watched and stopped."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

__all__ = ["iterate"]

Event = TypeVar("Event")


def iterate(work: Callable[[Callable[[Event], None], Callable[[], bool]], None]) -> Iterator[Event]:
    """Run `work(emit, abandoned)` in a thread of its own and yield what it emits.

    `abandoned()` becomes true when the consumer closes the iterator; `work` should return soon after. An
    exception in `work` is raised in the consumer. The thread ends with the iterator.
    """
    events: queue.SimpleQueue = queue.SimpleQueue()
    abandoned = threading.Event()
    failure: list[BaseException] = []

    def body() -> None:
        try:
            work(events.put, abandoned.is_set)
        except BaseException as error:  # raised by the consumer
            failure.append(error)
        events.put(None)

    thread = threading.Thread(target=body, name="generate", daemon=True)
    thread.start()
    try:
        while (event := events.get()) is not None:
            yield event
    finally:
        abandoned.set()
        thread.join()
    if failure:
        raise failure[0]
