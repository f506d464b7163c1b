"""Names of runs, a visitor's address, and faults that are told."""

from types import SimpleNamespace

import gradio as gr
import pytest

from dreambooth_moslora.ui.state import as_gradio_error
from dreambooth_moslora.ui.visitors import Visitors


def test_a_visitor_without_a_login_has_an_address():
    visitors, asked = Visitors(), {"cookies": {}, "session_hash": "s", "client": SimpleNamespace(host="203.0.113.1")}
    for username, address in ((None, "203.0.113.1"), ("ann", "")):
        assert visitors.of(SimpleNamespace(username=username, **asked)).address == address
    visitors.close()


def test_a_fault_of_ours_is_told_without_its_secrets_and_logged(caplog):
    def broken():
        raise KeyError("/secret/path")

    def broken_stream():
        yield 1
        raise KeyError("/secret/path")

    for handler in (broken, lambda: list(as_gradio_error(broken_stream)())):
        with pytest.raises(gr.Error, match="server's log") as told:
            as_gradio_error(handler)()
        assert "secret" not in told.value.message
    assert [str(record.exc_info[1]) for record in caplog.records] == ["'/secret/path'"] * 2
