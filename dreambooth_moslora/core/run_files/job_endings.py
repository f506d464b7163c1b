"""Why a run's process is gone, as well as it is known: from its exit status and its last words."""

import signal

__all__ = ["was_killed", "why_it_ended"]


def was_killed(code: int | None, log_tail: str) -> bool:
    """Whether a signal ended a process that wrote no end; where nobody knows its exit status, by its last words."""
    return code < 0 if code is not None else "rror" not in _last_words(log_tail)


def why_it_ended(code: int | None, log_tail: str, *, was_asked: bool) -> str:
    """Of a process that wrote no end; `code` is its exit status, None where an earlier server started it."""
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
    """The last line of the log that is no progress bar."""
    lines = [line for line in log_tail.splitlines() if line.strip() and "%|" not in line]
    return lines[-1][:300] if lines else ""
