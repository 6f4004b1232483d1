"""Byte ranges of files at a URL: a folder, a bucket, or an http server that may send anything.

Of an http server's answer no more is read than was asked for: fsspec would take in all of it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cache.errors import FormatError, StoreError, StoreNotFoundError

PATIENCE_SECONDS, LEAST_BYTES = 60.0, 64 << 10
"""An http server has so long to answer, and must then send at least so much in each such time: 1 KiB a second."""

AT_ONCE = 16
"""Requests under way: with an answer after 20 ms each, 800 a second."""

_AGAIN = "check the URL and the connection, and try again"


class RemoteFile:
    """Files below one URL.

    Attributes:
        url: The URL, for messages.
    """

    def __init__(self, url: str) -> None:
        """Name the URL; nothing is fetched."""
        self.url = url.rstrip("/")

    def ranges(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes [start, stop) of a file, for each span; see `fetch` for the errors."""
        found = [b""] * len(spans)
        self.fetch([(name, start, stop) for start, stop in spans], found.__setitem__)
        return found

    def fetch(self, spans: Sequence[tuple[str, int, int]], put: Callable[[int, bytes], None]) -> None:
        """Fetch spans of files, one request each, several at once where the protocol can.

        Args:
            spans: Name of the file, first byte, and the one behind the last; of a file that ends earlier, what it has.
            put: Takes the number of a span and its bytes as soon as they are here, in any order, one at a time.

        Raises:
            StoreNotFoundError: A file is not there.
            FormatError: The server sends something else than was asked for; it is not read to its end.
            StoreError: The server cannot be reached or refuses.
        """
        fs, path = file_system(self.url)

        def place(number: int) -> tuple[str, str]:
            """URL of a file, for messages, and its path in the file system."""
            name = spans[number][0]
            return (f"{self.url}/{name}", f"{path}/{name}") if name else (self.url, path)

        if getattr(fs, "async_impl", False):
            _fetch_at_once(fs, [(*place(i), start, stop) for i, (_, start, stop) in enumerate(spans)], put)
            return
        for number, (_, start, stop) in enumerate(spans):
            where, at = place(number)
            with _errors(where):
                data = bytes(fs.cat_file(at, start=start, end=stop))
            put(number, _as_asked(data, where, start, stop))

    def exactly(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file.

        Raises:
            FormatError: The file ends earlier.
        """
        (data,) = self.ranges(name, [(start, stop)])
        self.check_end(name, stop, start + len(data))
        return data

    def check_end(self, name: str, stop: int, end: int) -> None:
        """Refuse a file that ends before byte `stop`.

        Raises:
            FormatError: It does.
        """
        if end < stop:
            where = f"{self.url}/{name}" if name else self.url
            message = f"{where} ends before byte {stop}; it is damaged, or being pushed: try again, or push it again"
            raise FormatError(message)


def file_system(url: str) -> tuple[Any, str]:
    """Fsspec's file system for a URL, and the path in it.

    Raises:
        StoreError: It is empty, fsspec does not know it or lacks a package for it, or the server cannot be reached.
    """
    import fsspec.core

    if not url.strip():
        message = "the URL is empty; name a folder, or a place like s3://bucket/name"
        raise StoreError(message)
    try:
        with network_errors(url, values=False):
            fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        message = f"{url}: {error}; install what that kind of place needs, or use another"
        raise StoreError(message) from error
    return fs, str(path).rstrip("/")


def local_place(fs: Any, root: str) -> Path | None:
    """The folder on this machine that a file system and the path in it stand for, links resolved; None elsewhere."""
    from fsspec.implementations.local import LocalFileSystem

    return Path(os.path.realpath(root or "/")) if isinstance(fs, LocalFileSystem) else None


def is_http(fs: Any) -> bool:
    """Whether a file system speaks plain http, where the server alone decides how much it sends."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return bool(protocols & {"http", "https"})


def http_options(fs: Any, **headers: str) -> dict[str, Any]:
    """Options of one http request: the bytes of a file as they are, for sizes and places count those."""
    import aiohttp

    patience = aiohttp.ClientTimeout(total=None, sock_connect=PATIENCE_SECONDS / 2, sock_read=PATIENCE_SECONDS)
    own = {**fs.kwargs.get("headers", {}), "Accept-Encoding": "identity", **headers}
    return {"timeout": patience, **fs.kwargs, "headers": own, "auto_decompress": False}


class _Pace:
    """Gives up a server that sends so slowly that it would never end."""

    def __init__(self, url: str) -> None:
        self._url, self._since, self._got = url, time.monotonic(), 0

    def got(self, count: int) -> None:
        """Count bytes that have come.

        Raises:
            StoreError: They are too few for the time.
        """
        self._got += count
        passed = time.monotonic() - self._since
        if passed >= PATIENCE_SECONDS:
            if self._got < LEAST_BYTES:
                message = f"{self._url}: the server sent {self._got} bytes in {passed:.0f} s; {_AGAIN}"
                raise StoreError(message)
            self._since, self._got = time.monotonic(), 0


@asynccontextmanager
async def _answered(fs: Any, url: str, **headers: str) -> AsyncIterator[Any]:
    """The answer to a request, once its head has come; silent and trickling servers are given up.

    Raises:
        FileNotFoundError: The server does not know the file.
        StoreError: The head has not come in time.
    """
    session = await fs.set_session()
    request = session.get(fs.encode_url(url), **http_options(fs, **headers))
    try:
        answer = await asyncio.wait_for(request, PATIENCE_SECONDS)
    except TimeoutError:
        message = f"{url}: the server has not answered within {PATIENCE_SECONDS:.0f} s; {_AGAIN}"
        raise StoreError(message) from None
    async with answer:
        if answer.status == 404:
            raise FileNotFoundError(url)
        yield answer


class HttpStream:
    """A file at an http server from its beginning; the server need not know ranges for that."""

    def __init__(self, fs: Any, url: str) -> None:
        """Ask for the file.

        Raises:
            FileNotFoundError: The server does not know it.
            StoreError: It does not answer in time.
        """
        self._fs, self._pace = fs, _Pace(url)
        self._opened = _answered(fs, url)
        self._answer = self._wait(self._opened.__aenter__)
        try:
            self._answer.raise_for_status()
        except BaseException:
            self.close()
            raise

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; none at the end.

        Raises:
            TimeoutError: The server is silent.
            StoreError: It sends so slowly that it would never end.
        """
        block: bytes = self._wait(partial(self._answer.content.read, size))
        self._pace.got(len(block) if block else LEAST_BYTES)
        return block

    def close(self) -> None:
        """Let go of the connection, without reading the rest."""
        self._answer.close()
        self._wait(partial(self._opened.__aexit__, None, None, None))

    def _wait(self, function: Callable[[], Any]) -> Any:
        from fsspec.asyn import sync

        return sync(self._fs.loop, function)

    def __enter__(self) -> HttpStream:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


_CLIENTS = {
    *("aiohttp", "azure", "botocore", "ftplib", "gcsfs", "google", "httpx", "httpx2", "huggingface_hub", "requests")
}
"""Packages that speak to servers, each with errors of its own; most of them are not installed everywhere."""


@contextmanager
def network_errors(url: str, *, values: bool = True) -> Iterator[None]:
    """Turn what requests to servers fail with into a `StoreError` that names the URL.

    Args:
        url: The URL.
        values: A `ValueError` is one of them: that of a URL that is none.
    """
    try:
        yield
    except Exception as error:
        lost = isinstance(error, TimeoutError | ConnectionError | socket.gaierror)
        foreign = type(error).__module__.partition(".")[0] in _CLIENTS and not isinstance(error, FileNotFoundError)
        if not (lost or foreign or (values and isinstance(error, ValueError))):
            raise
        silent = "the server is silent" if isinstance(error, TimeoutError) else type(error).__name__
        message = f"{url}: {str(error) or silent}; {_AGAIN}"
        raise StoreError(message) from error


def _fetch_at_once(fs: Any, spans: Sequence[tuple[str, str, int, int]], put: Callable[[int, bytes], None]) -> None:
    """Fetch spans, each as URL, path, start and stop, in the loop that the connections of `fs` belong to."""
    from fsspec.asyn import sync

    left, failures = iter(enumerate(spans)), list[BaseException]()
    span = _http_range if is_http(fs) else _other_range

    async def fetch_next() -> None:
        while not failures and (item := next(left, None)) is not None:
            number, (where, path, start, stop) = item
            try:
                with _errors(where):
                    data = await span(fs, path, start, stop)
                put(number, _as_asked(data, where, start, stop))
            except BaseException as failure:
                failures.append(failure)

    async def fetch_all() -> None:
        await asyncio.gather(*(fetch_next() for _ in range(min(AT_ONCE, len(spans)))))

    try:
        sync(fs.loop, fetch_all)
    except BaseException as failure:  # an interrupt: no further request is begun
        failures.append(failure)
    if failures:
        raise failures[0]


async def _other_range(fs: Any, path: str, start: int, stop: int) -> bytes:
    """One span of a file in a bucket."""
    return bytes(await fs._cat_file(path, start=start, end=stop))


@contextmanager
def _errors(where: str) -> Iterator[None]:
    """Turn what reading a file fails with into the errors of `RemoteFile.fetch`."""
    try:
        with network_errors(where):
            yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        message = f"{where} does not exist; check the URL, or push the store again"
        raise StoreNotFoundError(message) from error


def _as_asked(data: bytes | None, where: str, start: int, stop: int) -> bytes:
    """What came, if it is not something else than bytes [start, stop)."""
    if data is None or len(data) > stop - start:
        message = (
            f"{where}: the server sent something else than the {stop - start} bytes from byte {start} on; it "
            f"does not know ranges: pull the store, or put it on another server"
        )
        raise FormatError(message)
    return data


async def _http_range(fs: Any, url: str, start: int, stop: int) -> bytes | None:
    """One span of a file; of an answer without an end no more is read than shows that it is not the span."""
    pace = _Pace(url)
    async with _answered(fs, url, Range=f"bytes={start}-{stop - 1}") as answer:
        if answer.status == 416:  # the file ends before `start`
            return b""
        answer.raise_for_status()
        expected = f"bytes {start}-"
        in_place = answer.headers.get("Content-Range", expected).startswith(expected)
        if not (in_place if answer.status == 206 else start == 0) or (answer.content_length or 0) > stop - start:
            return None
        blocks, left = [], stop - start + 1
        while left and (block := await answer.content.read(left)):
            pace.got(len(block))
            blocks.append(block)
            left -= len(block)
    return b"".join(blocks)
