"""The events of a run as the page reads them: the file lies on a disk, and anybody may have changed it."""

from typing import Any

from dreambooth_moslora.core.run_files.event_log import Metrics

__all__ = ["RunEvents", "phase_of"]

NUMBER = (int, float)
KINDS = {
    **dict.fromkeys(("step", "max_train_steps", "done", "total"), int),
    **dict.fromkeys(("time", "loss", "step_sec", "eta_sec", "memory_gib"), NUMBER),
    **dict.fromkeys(("phase", "state", "message"), str),
    "files": list,
    "config": dict,
}
"""Field -> what the page takes it for; null is always allowed."""


class RunEvents(Metrics):
    """Metrics without the events that have a field of another kind than the trainer writes."""

    def refresh(self) -> "RunEvents":
        known, count = self.events, len(self.events)
        super().refresh()
        start = count if self.events is known else 0
        self.events[start:] = [event for event in self.events[start:] if is_sound(event)]
        return self


def is_sound(event: dict[str, Any]) -> bool:
    if event["type"] == "step" and event.get("step") is None:
        return False
    return all(event.get(name) is None or isinstance(event[name], kind) for name, kind in KINDS.items())


def phase_of(events: list[dict[str, Any]]) -> str:
    """What the trainer does now: a step after the last announced phase means that it trains."""
    for event in reversed(events):
        if event["type"] in ("phase", "step"):
            return str(event.get("phase") or "training")
    return ""
