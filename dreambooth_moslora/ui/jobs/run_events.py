"""The events of a run as the page reads them; anyone may have edited the file."""

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
"""Field -> the type that the page expects; null is always allowed."""


class RunEvents(Metrics):
    """Metrics without events whose fields have another type than the trainer writes."""

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
    """What the trainer does now. It trains after a step, and after the last of the photos, when no other phase has
    begun."""
    for event in reversed(events):
        if event["type"] in ("phase", "step"):
            was_last = event.get("phase") == "caching" and event.get("done") == event.get("total")
            return "training" if was_last else str(event.get("phase") or "training")
    return ""
