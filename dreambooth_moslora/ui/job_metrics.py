"""The events of a run, read from its `metrics.jsonl` while the trainer writes it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreambooth_moslora.event_lines import parse_event

__all__ = ["Metrics"]


@dataclass
class Metrics:
    """The events, read from where the last reading stopped; a half-written line waits.

    A resumed run begins with a shorter file in the old one's place, and a folder may be deleted and its name used
    again. So the last line that was read, which holds its time, must still stand where it stood; if not, all is read
    anew.
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
        """Events of the last start: a resumed run has an `end` of the earlier one before it."""
        starts = [i for i, event in enumerate(self.events) if event.get("type") == "start"]
        return self.events[starts[-1] :] if starts else []
