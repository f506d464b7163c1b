"""A file of events, such as a run's `metrics.jsonl`: one JSON object a line, added to and never rewritten in place."""

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["append_event", "parse_event", "read_events"]


def append_event(path: Path, event: dict[str, Any]) -> None:
    """Add one line. Numbers that JSON does not know (NaN, infinity) become null."""
    line = json.dumps(finite(event), ensure_ascii=False, allow_nan=False, default=str) + "\n"
    with path.open("a+b") as file:
        file.write((f"\n{line}" if ends_torn(file) else line).encode())


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events so far; a line torn by a kill is left out."""
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
    """None for a line that is no event of ours."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    is_event = isinstance(event, dict) and isinstance(event.get("type"), str)
    return event if is_event and isinstance(event.get("step", 0), int) else None
