"""What Gradio remembers of each session (a page in a browser, until the server ends) stays small."""

from typing import Any

from gradio.blocks import Block
from gradio.state_holder import SessionState

__all__ = ["MAX_SESSIONS", "keep_sessions_small"]

MAX_SESSIONS = 256
"""Of 250 KB each; by itself Gradio remembers 10,000. Whose session is forgotten begins a new one at the next click."""

_put = SessionState.__setitem__


def keep_sessions_small() -> None:
    """Let sessions hold one component in each place, however often it is updated.

    Gradio puts an updated component, which has a new number, in the old one's place, and by its next value in the new
    number's place as well: two components more with each job, for as long as the session is remembered.
    """
    SessionState.__setitem__ = _put_with_its_number


def _put_with_its_number(session: SessionState, number: int, value: Any) -> None:
    if isinstance(value, Block):
        value._id = number
    _put(session, number, value)
