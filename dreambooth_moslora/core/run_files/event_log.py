"""A file of events, such as a run's `metrics.jsonl`: one JSON object per line, only appended to."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["Metrics", "append_event", "parse_event", "read_events"]


def append_event(path: Path, event: dict[str, Any]) -> None:
    """Append one line. Numbers that JSON cannot hold (NaN, infinity) become null."""
    line = json.dumps(finite(event), ensure_ascii=False, allow_nan=False, default=str) + "\n"
    with path.open("a+b") as file:
        file.write((f"\n{line}" if ends_torn(file) else line).encode())


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events so far; a line cut off by a kill is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [event for line in lines if (event := parse_event(line)) is not None]


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ends_torn(file: BinaryIO) -> bool:
    """Whether the open file's last line was cut off by a kill."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def parse_event(line: str | bytes) -> dict[str, Any] | None:
    """The event in a line; None for any other line."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_event = isinstance(event, dict) and isinstance(event.get("type"), str)
    return event if is_event and isinstance(event.get("step", 0), int) else None


@dataclass
class Metrics:
    """The events, read from where the last reading stopped; an unfinished line is read later.

    A resumed run replaces the file by a shorter one, and a deleted folder's name may be used again. So the last
    line that was read, which holds its time, must still be at its place; if not, everything is read again.
    """

    path: Path
    events: list[dict[str, Any]] = field(default_factory=list)
    _offset: int = 0
    _last_line: bytes = b""

    def refresh(self) -> "Metrics":
        try:
            data = self._unread()
        except OSError:
            self._forget()
            return self
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines(keepends=True)
        self._offset += len(whole)
        self._last_line = lines[-1] if lines else self._last_line
        self.events += [event for line in lines if (event := parse_event(line))]
        return self

    def _unread(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self._offset - len(self._last_line))
            if file.read(len(self._last_line)) != self._last_line:
                self._forget()
                file.seek(0)
            return file.read()

    def _forget(self) -> None:
        self.events, self._offset, self._last_line = [], 0, b""

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("type") == kind]

    def last(self, kind: str) -> dict[str, Any]:
        return next((event for event in reversed(self.events) if event.get("type") == kind), {})

    def since_start(self) -> list[dict[str, Any]]:
        """Events since the last start. In a resumed run, events of the earlier one, even an `end`, come before it."""
        starts = [i for i, event in enumerate(self.events) if event.get("type") == "start"]
        return self.events[starts[-1] :] if starts else []
