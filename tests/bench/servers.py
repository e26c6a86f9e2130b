"""Servers in a thread, for the load client."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator

from bench.process import free_port


class Handler(http.server.BaseHTTPRequestHandler):
    """Reads requests, and logs nothing: pytest's output is enough."""

    def read_body(self) -> bytes:
        """The body of the request."""
        return self.rfile.read(int(self.headers["Content-Length"]))

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64  # with the default of 5 the kernel would drop connects, and the client would wait a second


@contextlib.contextmanager
def serving(handler: type[Handler]) -> Iterator[int]:
    """Serve with `handler` while the block runs; yields the port."""
    server = _Server(("127.0.0.1", free_port()), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
