"""Explains why a run's process ended, from its exit status and the end of its log."""

import signal

__all__ = ["was_killed", "why_it_ended"]


def was_killed(code: int | None, log_tail: str) -> bool:
    """Whether a signal ended a process that recorded no end; without an exit status, its log decides."""
    return code < 0 if code is not None else "rror" not in _last_words(log_tail)


def why_it_ended(code: int | None, log_tail: str, *, was_asked: bool) -> str:
    """The reason, for a process that recorded no end. `code` is None if an earlier server had started it."""
    words = _last_words(log_tail)
    if code == -signal.SIGTERM and was_asked:
        return "It was stopped before training had begun."
    if code is not None and code < 0:
        cause = "" if was_asked else ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        return f"The process was killed by {signal.Signals(-code).name}{cause}."
    if code is None and was_killed(code, log_tail):
        cause = "" if was_asked else ", perhaps for want of memory"
        return f"The process was killed{cause}; its last words: {words or 'none'}"
    return words or "The process ended without a word."


def _last_words(log_tail: str) -> str:
    """The last line of the log that is not a progress bar."""
    lines = [line for line in log_tail.splitlines() if line.strip() and "%|" not in line]
    return lines[-1][:300] if lines else ""
