"""Ports of the loopback for servers that tests start."""

import socket


def find_free_port() -> int:
    """Return an unused port of the loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
