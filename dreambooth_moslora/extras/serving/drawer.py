"""One replica: a base, its loaded adapters, and a queue of orders. It does not depend on Ray.

The pictures of a batch are drawn one after another, not as rows of one tensor: a row's last bits
would depend on its neighbours, and the picture must equal that of `generate`. A batch saves loading
and switching adapters.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.serving.catalogue import (
    AdapterRef,
    Order,
    RefusedError,
    too_late,
)
from dreambooth_moslora.generation.image_params import check_size
from dreambooth_moslora.generation.pipeline import SubjectPipeline


class Batches:
    """Waiting items, each with a key.

    A batch is the longest waiting item and up to `most` - 1 others with its key, so that no item
    starves.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._waiting: list[tuple[Any, Any]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, key: Any, item: Any) -> None:
        self._waiting.append((key, item))

    def take(self) -> list:
        """The next batch; empty when nothing waits."""
        batch = []
        others = []
        for key, item in self._waiting:
            longest_waiting, _ = self._waiting[0]
            if key == longest_waiting and len(batch) < self.most:
                batch.append(item)
            else:
                others.append((key, item))
        self._waiting = others
        return batch


@dataclass
class Waiting:
    """An order in the queue: its `answer` to be, and the `deadline` on the monotonic clock."""

    order: Order
    answer: asyncio.Future
    deadline: float

    @property
    def is_left(self) -> bool:
        """Whether the client has gone or the time is over."""
        return self.answer.done() or time.monotonic() > self.deadline


class Drawer:
    """Draws orders, one at a time.

    pipeline: holds the base, and the adapters that were loaded last
    batch: most orders of a batch
    load: awaited with each adapter's key before an order is drawn. It must call `load_now`,
        directly or through a cache that Ray Serve's router knows
    """

    def __init__(
        self,
        pipeline: SubjectPipeline,
        *,
        batch: int = 8,
        load: Callable[[str], Awaitable[object]] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.batches = Batches(batch)
        self._load = load or self.load_now
        self._refs: dict[str, AdapterRef] = {}  # of the order that is being drawn, by key
        self._thread = ThreadPoolExecutor(1, "draw")  # one: pictures are drawn one at a time
        self._work: asyncio.Task | None = None

    async def draw(self, order: Order) -> bytes:
        """A PNG. Raises RefusedError, and UserError for an order that cannot be drawn."""
        # refuse what can never be drawn
        check_size(order.params, self.pipeline.resolution_px)
        most = self.pipeline.resident_adapters
        if most < len({ref.version for ref in order.adapters}):
            raise UserError(
                f"this service draws with at most {most} adapters at once (--resident_adapters)"
            )

        # queue it, and wake the one task that draws
        answer = asyncio.get_running_loop().create_future()
        waiting = Waiting(order, answer, deadline=time.monotonic() + order.seconds)
        self.batches.put(order.batch_key, waiting)
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._draw_all())
        return await answer

    async def load_now(self, key: str) -> str:
        """Load the adapter of that key into the model, in the thread that draws."""
        await self._in_thread(self._bring, self._refs[key])
        return key

    async def _draw_all(self) -> None:
        while batch := self.batches.take():
            for waiting in batch:
                await self._draw_one(waiting)

    async def _draw_one(self, waiting: Waiting) -> None:
        """Draw one, and answer it with the picture or the error."""
        answer = waiting.answer
        try:
            if waiting.is_left:
                raise too_late()
            # `load` knows keys only, as Ray Serve's router does
            for ref in waiting.order.adapters:
                self._refs[ref.key] = ref
                await self._load(ref.key)
            png = await self._in_thread(self._png, waiting)
            # the client may have gone meanwhile
            if not answer.done():
                answer.set_result(png)
        except Exception as error:
            if not answer.done():
                answer.set_exception(error)
        finally:
            for ref in waiting.order.adapters:
                self._refs.pop(ref.key, None)

    async def _in_thread(self, function: Callable, *arguments: object) -> object:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _bring(self, ref: AdapterRef) -> None:
        """Load the adapter, unless it is in the model and its file has not changed. Raises
        RefusedError."""
        try:
            self.pipeline.load_adapter(ref.place, ref.name)
        except FileNotFoundError as error:
            raise RefusedError(404, f"the adapter {ref.name} was taken away") from error

    def _png(self, waiting: Waiting) -> bytes:
        """The picture as a file. Raises RefusedError, and UserError."""
        order = waiting.order
        for ref in order.adapters:
            # may have been evicted meanwhile, by another adapter of this order or of the cache
            self._bring(ref)
            expected = order.sha256.get(ref.name)
            if expected not in (None, self.pipeline.adapters[ref.name].sha256):
                line = f"the adapter {ref.name} here is another file than the one that is asked for"
                raise RefusedError(409, line)
        images = self.pipeline.draw(order.params, lambda: waiting.is_left)
        if not images:
            raise too_late()
        return images[0].png()
