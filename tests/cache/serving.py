"""A real http server of one folder on this machine, with ranges or without."""

from __future__ import annotations

import functools
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder, whole or in ranges; every request is written down."""

    def log_message(self, *arguments: Any) -> None:
        """Nothing: pytest shows the log of a failed test."""

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))  # type: ignore[attr-defined]
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        if asked and self.server.ranges:  # type: ignore[attr-defined]
            first, last = asked.removeprefix("bytes=").split("-")
            if not first:  # the last bytes
                first, last = str(len(content) - int(last)), str(len(content) - 1)
            part = content[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        else:
            part = content
            self.send_response(200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


class Server(ThreadingHTTPServer):
    """A server of one folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.requests: list[tuple[str, str | None]] = []
        self.ranges = True
        self.url = f"http://127.0.0.1:{self.server_port}"
