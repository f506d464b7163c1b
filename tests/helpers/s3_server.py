"""A server that speaks S3 (moto), in a thread of this process, which refuses some uploads for want of time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from urllib.request import Request, urlopen

from werkzeug.serving import make_server


@contextmanager
def s3_server(every: int, away: threading.Event | None = None) -> Iterator[str]:
    """Its address. The first of `every` uploads is answered by 503, when half of it has come, and while it is `away`
    each request."""
    from moto.server import DomainDispatcherApplication, create_backend_app

    whole, numbers = DomainDispatcherApplication(create_backend_app), count()

    def application(environ, start_response):
        if away and away.is_set():
            start_response("503 Service Unavailable", [("Connection", "close")])
            return [b""]
        if environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].count("/") > 1 and next(numbers) % every == 0:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
            start_response("503 Service Unavailable", [("Connection", "close")])
            return [b""]
        return whole(environ, start_response)

    with serving(application) as address:
        urlopen(Request(f"{address}/moto-api/reset", method="POST")).close()  # its buckets are the process's
        yield address


@contextmanager
def serving(application: Callable) -> Iterator[str]:
    """The address of a server of this WSGI application. The next one is asked anew: fsspec keeps file systems."""
    from s3fs import S3FileSystem

    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        S3FileSystem.clear_instance_cache()
