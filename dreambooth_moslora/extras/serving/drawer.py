"""Run one replica: a base, its loaded adapters, and a queue of orders. It does not depend on Ray.

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
    ImageOrder,
    RefusedError,
    build_timeout_error,
)
from dreambooth_moslora.generation.image_params import check_size
from dreambooth_moslora.generation.pipeline import SubjectPipeline


class BatchQueue:
    """Waiting items, each with a key.

    A batch is the longest waiting item and up to `most` - 1 others with its key, so that no item
    starves.
    """

    def __init__(self, most: int) -> None:
        self.max_size = most
        self._waiting: list[tuple[Any, Any]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, key: Any, item: Any) -> None:
        self._waiting.append((key, item))

    def dequeue_batch(self) -> list:
        """Return the next batch; empty when nothing waits."""
        batch = []
        waiting = []
        for key, item in self._waiting:
            longest_waiting, _ = self._waiting[0]
            if key == longest_waiting and len(batch) < self.max_size:
                batch.append(item)
            else:
                waiting.append((key, item))
        self._waiting = waiting
        return batch


@dataclass
class PendingOrder:
    """Order in the queue, with the future `answer` and the `deadline` on the monotonic clock."""

    order: ImageOrder
    answer: asyncio.Future
    deadline: float

    @property
    def is_expired(self) -> bool:
        """Return whether the client has gone or the time is over."""
        return self.answer.done() or time.monotonic() > self.deadline


class ImageWorker:
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
        self.batches = BatchQueue(batch)
        self._load = load or self.load_now
        self._refs: dict[str, AdapterRef] = {}  # of the order that is being drawn, by key
        self._thread = ThreadPoolExecutor(1, "draw")  # one: pictures are drawn one at a time
        self._work: asyncio.Task | None = None

    async def draw(self, order: ImageOrder) -> bytes:
        """Return a PNG. Raises RefusedError, and UserError for an order that cannot be drawn."""
        # refuse what can never be drawn
        check_size(order.params, self.pipeline.resolution_px)
        most = self.pipeline.resident_adapters
        if most < len({ref.version for ref in order.adapters}):
            raise UserError(
                f"this service draws with at most {most} adapters at once (--resident_adapters)"
            )

        # queue it, and wake the one task that draws
        answer = asyncio.get_running_loop().create_future()
        waiting = PendingOrder(order, answer, deadline=time.monotonic() + order.seconds)
        self.batches.put(order.batch_key, waiting)
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._generate_orders())
        return await answer

    async def load_now(self, key: str) -> str:
        """Load the adapter of that key into the model, in the thread that draws."""
        await self._run_in_thread(self._load_adapter, self._refs[key])
        return key

    async def _generate_orders(self) -> None:
        while batch := self.batches.dequeue_batch():
            for waiting in batch:
                await self._generate_order(waiting)

    async def _generate_order(self, waiting: PendingOrder) -> None:
        """Draw one, and answer it with the picture or the error."""
        answer = waiting.answer
        try:
            if waiting.is_expired:
                raise build_timeout_error()
            # `load` knows keys only, as Ray Serve's router does
            for ref in waiting.order.adapters:
                self._refs[ref.key] = ref
                await self._load(ref.key)
            png = await self._run_in_thread(self._generate_png, waiting)
            # the client may have gone meanwhile
            if not answer.done():
                answer.set_result(png)
        except Exception as error:
            if not answer.done():
                answer.set_exception(error)
        finally:
            for ref in waiting.order.adapters:
                self._refs.pop(ref.key, None)

    async def _run_in_thread(self, function: Callable, *arguments: object) -> object:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _load_adapter(self, ref: AdapterRef) -> None:
        """Load the adapter, unless it is in the model and its file has not changed. Raises
        RefusedError."""
        try:
            self.pipeline.load_adapter(ref.place, ref.name)
        except FileNotFoundError as error:
            raise RefusedError(404, f"the adapter {ref.name} was taken away") from error

    def _generate_png(self, waiting: PendingOrder) -> bytes:
        """Generate the picture as a file. Raises RefusedError, and UserError."""
        order = waiting.order
        for ref in order.adapters:
            # may have been evicted meanwhile, by another adapter of this order or of the cache
            self._load_adapter(ref)
            expected = order.sha256.get(ref.name)
            if expected not in (None, self.pipeline.adapters[ref.name].sha256):
                line = f"the adapter {ref.name} here is another file than the one that is asked for"
                raise RefusedError(409, line)
        images = self.pipeline.draw(order.params, lambda: waiting.is_expired)
        if not images:
            raise build_timeout_error()
        return images[0].png()
