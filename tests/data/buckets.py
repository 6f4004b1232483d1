"""A stand-in of S3, Google Cloud Storage and the hub on this machine: of each what reading a folder asks it for."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.cache import serving
from tests.data.serving import answering

URLS = {"s3": "s3://bucket", "gs": "gs://bucket", "hf": "hf://datasets/org/bucket"}
WHEN = "2026-01-01T00:00:00.000Z"
COMMIT = "0" * 40


class Handler(serving.Handler):
    """One bucket, under the paths of each service; a file in it is sent as `serving` sends it."""

    server: Buckets

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        asked = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, answer in _ROUTES:
            if found := re.fullmatch(pattern, url.path):
                if self.server.refuses:
                    self.give("{}", 403)
                else:
                    answer(self, unquote(found["name"] or ""), asked)
                return
        self.give("{}", 401 if url.path.startswith("/api/") else 404)  # the hub tells nobody what there is not

    def give(self, text: str, status: int = 200) -> None:
        """Answer with a text, whether XML or JSON."""
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml" if text.startswith("<") else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def file(self, name: str, _: dict[str, str]) -> None:
        """Send a file, or what there is to say of it."""
        self.path = f"/{quote(name)}"
        (super().do_HEAD if self.command == "HEAD" else super().do_GET)()

    def of_s3(self, _: str, asked: dict[str, str]) -> None:
        """List what begins with a prefix, the way S3 does."""
        found = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>{WHEN}</LastModified><ETag>{etag}</ETag>"
            f"<Size>{size}</Size></Contents>"
            for name, size, etag in self.server.files(asked.get("prefix", ""))
        )
        self.give(f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>")

    def of_gs(self, _: str, asked: dict[str, str]) -> None:
        """List what begins with a prefix, the way Google does."""
        found = [
            {"name": name, "size": str(size), "etag": etag, "updated": WHEN}
            for name, size, etag in self.server.files(asked.get("prefix", ""))
        ]
        self.give(json.dumps({"items": found}))

    def of_hub(self, name: str, _: dict[str, str]) -> None:
        """List a folder, the way the hub does."""
        found = [
            {"type": "file", "path": name, "size": size, "oid": etag}
            for name, size, etag in self.server.files(f"{name}/")
        ]
        self.give(json.dumps(found))

    def about_hub(self, _: str, __: dict[str, str]) -> None:
        """Tell what the hub knows of a data set."""
        self.give(json.dumps({"id": "org/bucket", "sha": COMMIT}))


_ROUTES: tuple[tuple[str, Any], ...] = (
    (r"/bucket(?P<name>)/?", Handler.of_s3),
    (r"/bucket/(?P<name>.+)", Handler.file),
    (r"/storage/v1/b/bucket/o(?P<name>)/?", Handler.of_gs),
    (r"(/download)?/storage/v1/b/bucket/o/(?P<name>.+)", Handler.file),
    (r"/api/datasets/org/bucket/tree/[^/]+/(?P<name>.+)", Handler.of_hub),
    (r"/api/datasets/org/bucket(?P<name>)(/revision/[^/]+)?", Handler.about_hub),
    (r"/datasets/org/bucket/resolve/[^/]+/(?P<name>.+)", Handler.file),
)


class Buckets(ThreadingHTTPServer):
    """A server of one folder as a bucket.

    Attributes:
        requests: Path and range of each file that was sent.
        refuses: Whether it lets nobody read.
        options: What each of fsspec's file systems must be told to ask this server.
    """

    daemon_threads = True
    request_queue_size = 128
    ranges = True
    refuses = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.folder = folder
        self.requests: list[tuple[str, str | None]] = []
        url = f"http://127.0.0.1:{self.server_port}"
        self.options = {
            "s3": {"endpoint_url": url, "key": "me", "secret": "mine"},
            "gs": {"endpoint_url": url, "token": "anon"},
            "hf": {"endpoint": url, "token": False},
        }

    def files(self, prefix: str) -> list[tuple[str, int, str]]:
        """Name, size in bytes and version of each file whose name begins with a prefix."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        named = [(path.relative_to(self.folder).as_posix(), path.read_bytes()) for path in found]
        return [(name, len(data), hashlib.md5(data).hexdigest()) for name, data in named if name.startswith(prefix)]


@contextmanager
def serving_buckets(folder: Path) -> Iterator[Buckets]:
    """Serve a folder as long as the block lasts."""
    with Buckets(folder) as server, answering(server):
        yield server
