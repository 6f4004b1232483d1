"""A real http server of one folder that tells versions, and asks for what gives access where it is told to."""

from __future__ import annotations

import base64
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.cache import serving

USER, QUERY = "me:top-secret", "sig=also-secret"


class Handler(serving.Handler):
    """Files of a folder for whom it knows, once it has failed as often as it shall."""

    def _answers(self) -> bool:
        server: Server = self.server  # type: ignore[assignment]
        known = f"Basic {base64.b64encode(USER.encode()).decode()}"
        if server.down_after is not None and len(server.requests) >= server.down_after:
            self.send_error(503)
        elif server.failures > 0:
            server.failures -= 1
            self.send_error(503)
        elif server.guarded and not (self.headers.get("Authorization") == known and self.path.endswith(QUERY)):
            self.send_error(403)
        else:
            return True
        return False

    def do_HEAD(self) -> None:
        server: Server = self.server  # type: ignore[assignment]
        server.asked.append(self.path)
        if self._answers():
            super().do_HEAD()

    def do_GET(self) -> None:
        if self._answers():
            super().do_GET()

    def send_header(self, keyword: str, value: str) -> None:
        server: Server = self.server  # type: ignore[assignment]
        if server.versions or keyword != "Last-Modified":
            super().send_header(keyword, value)


class Server(ThreadingHTTPServer):
    """A server of one folder.

    Attributes:
        requests: Path and range of each GET that was answered.
        asked: Path of each HEAD.
        ranges: Whether it sends parts of files.
        versions: Whether it tells when a file was changed.
        guarded: Whether it answers only who gives user, password and signature.
        failures: How many requests it is going to fail with status 503.
        down_after: How many files it sends before it fails for good; None for no end.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.requests: list[tuple[str, str | None]] = []
        self.asked: list[str] = []
        self.ranges = self.versions = True
        self.guarded, self.failures = False, 0
        self.down_after: int | None = None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def with_access(self, path: str) -> str:
        """The URL of a path with all that gives access."""
        return f"http://{USER}@127.0.0.1:{self.server_port}/{path}?{QUERY}"


@contextmanager
def serving_folder(folder: Path) -> Iterator[Server]:
    """Serve a folder as long as the block lasts."""
    with Server(folder) as server, answering(server):
        yield server


@contextmanager
def answering(server: ThreadingHTTPServer) -> Iterator[None]:
    """Let a server answer as long as the block lasts."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield
    server.shutdown()
    thread.join()
