"""A queue of orders. They are taken in the order of arrival, in batches that need the same adapters and size."""

from collections import OrderedDict, deque
from itertools import count
from typing import Any, Generic, TypeVar

__all__ = ["Batches"]

Item = TypeVar("Item")


class Batches(Generic[Item]):
    """A batch is the longest waiting item and up to `most` - 1 others with its key. Thus a batch loads its
    adapters once, and no item starves behind a popular key."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._waiting: OrderedDict[Any, deque[tuple[int, Item]]] = OrderedDict()
        self._numbers = count()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, key: Any, item: Item) -> None:
        self._waiting.setdefault(key, deque()).append((next(self._numbers), item))

    def take(self) -> list[Item]:
        """The next batch; empty when nothing waits."""
        if not self._waiting:
            return []
        key = min(self._waiting, key=lambda key: self._waiting[key][0][0])
        line = self._waiting[key]
        batch = [line.popleft()[1] for _ in range(min(self.most, len(line)))]
        if not line:
            del self._waiting[key]
        return batch
