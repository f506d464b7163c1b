"""CUDA's streams, and the host memory that it copies from, on a machine without a GPU."""

from contextlib import contextmanager

import pytest
import torch


class Stream:
    """A stream: `done` is what has surely ended when its next work begins."""

    def __init__(self, device: torch.device | None = None):
        self.done: set[str] = set()

    def run(self, work: str) -> set[str]:
        """Queue work of this name. Returns what has surely ended when it begins."""
        before = set(self.done)
        self.done.add(work)
        return before

    def wait_stream(self, stream: "Stream") -> None:
        self.done |= stream.done

    def record_event(self) -> frozenset[str]:
        return frozenset(self.done)

    def wait_event(self, event: frozenset[str]) -> None:
        self.done |= event


class FakeCuda:
    """Streams in place of `torch.cuda`'s, and host memory that is pinned by name alone.

    copies: (whether the source is pinned, whether nobody waited) of each copy
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.current = Stream()
        self.pinned: set[int] = set()
        self.copies: list[tuple[bool, bool]] = []
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)

        # Functions, as a tensor is not bound to a method of another object
        self.move, copy = torch.Tensor.to, torch.Tensor.copy_

        def copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False):
            self.note(source, non_blocking)
            return copy(target, source)

        monkeypatch.setattr(torch.Tensor, "copy_", copy_)
        monkeypatch.setattr(torch.Tensor, "to", lambda *args, **options: self.to(*args, **options))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self.pin(tensor))
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: self.is_pinned(tensor))

    @contextmanager
    def stream(self, stream: Stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned.add(tensor.data_ptr())
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.data_ptr() in self.pinned

    def to(self, tensor: torch.Tensor, target, *args, non_blocking: bool = False, **options):
        """A tensor on a GPU is a copy of it on the CPU."""
        if not isinstance(target, torch.device) or target.type == "cpu":
            return self.move(tensor, target, *args, non_blocking=non_blocking, **options)
        self.note(tensor, non_blocking)
        return tensor.clone()

    def note(self, source: torch.Tensor, non_blocking: bool) -> None:
        self.copies.append((self.is_pinned(source), non_blocking))
