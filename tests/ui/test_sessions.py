"""A session's name, which stands in addresses and so in a proxy's log, opens nothing to another browser."""

import secrets

import httpx

from tests.helpers.ui_server import cookie_of
from tests.ui.test_private_events import event_of


def joined(served, session: str) -> str:
    """Ann starts something that is done at once."""
    body = {"fn_index": event_of(served, "refresh", "click"), "data": [], "session_hash": session}
    answer = httpx.post(f"{served.url}gradio_api/queue/join", json=body, headers=cookie_of("ann"))
    return answer.raise_for_status().json()["event_id"]


def test_anothers_stream_is_neither_read_nor_cut_off(served):
    session = secrets.token_hex(8)
    event = joined(served, session)
    stream = f"{served.url}gradio_api/queue/data?session_hash={session}"
    cancel = {"session_hash": session, "fn_index": 0, "event_id": event}
    for headers in (cookie_of("eve"), {}):
        assert httpx.get(stream, headers=headers).status_code == 403
        assert httpx.post(f"{served.url}gradio_api/cancel", json=cancel, headers=headers).status_code == 403
    assert "process_completed" in httpx.get(stream, headers=cookie_of("ann"), timeout=20).text
    assert httpx.post(f"{served.url}gradio_api/cancel", json=cancel, headers=cookie_of("ann")).json() == {
        "success": True
    }


def test_a_session_without_a_cookie_is_whoevers_who_knows_its_name(served):
    """As a client of the API has none."""
    session = secrets.token_hex(8)
    cancel = {"session_hash": session, "fn_index": 0, "event_id": "x"}
    assert httpx.post(f"{served.url}gradio_api/cancel", json=cancel).json() == {"success": True}


def test_no_session_is_turned_into_a_link(served):
    link = f"{served.url}gradio_api/deep_link?session_hash={secrets.token_hex(8)}"
    assert httpx.get(link, headers=cookie_of("eve")).status_code == 403
