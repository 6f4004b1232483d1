"""Stores that are read where they lie, over a real http server: few requests, checked, from many threads."""

from __future__ import annotations

import pickle
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import cache
from cache.reading import ranges
from tests.cache.making import FORMATS, ROWS_PER_SHARD, assert_holds, build, feature, files, rows
from tests.cache.serving import Server
from tests.cache.test_damage import damage_row

WANTED = rows(range(22))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_store_is_read_over_http_one_range_a_shard_where_rows_are_short(
    suffix: str, tmp_path: Path, server: Server
) -> None:
    build(tmp_path / "served" / f"store.{suffix}", WANTED)
    store = cache.open_store(f"{server.url}/store.{suffix}")
    assert store.ids == tuple(row.id for row in WANTED)
    _ = store.extents, store.read([0])
    dice = np.random.default_rng(3)
    for _ in range(12):
        order = dice.integers(0, 22, 6)
        server.requests.clear()
        read = store.read(order, ["neck"])["neck"]
        for i, number in enumerate(order):
            assert read[i].tobytes() == feature(int(number))["neck"].tobytes()
        shards = len({number // ROWS_PER_SHARD for number in order.tolist()})
        assert len(server.requests) <= shards
        assert all(asked for _, asked in server.requests), "nothing is fetched whole"
    assert_holds(store, WANTED)
    server.requests.clear()
    assert_holds(store, WANTED)
    assert server.requests == [], "what was read once is here"
    assert_holds(pickle.loads(pickle.dumps(store)), WANTED)
    assert not any("c." in path and "index" not in path for path, _ in server.requests)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", ["pushed", "pushed.h5", "pushed.zarr"])
def test_what_was_pushed_is_read_where_it_lies(suffix: str, name: str, tmp_path: Path, server: Server) -> None:
    build(tmp_path / f"mine.{suffix}", WANTED)
    (tmp_path / "served").mkdir(exist_ok=True)
    cache.push_store(tmp_path / f"mine.{suffix}", str(tmp_path / "served" / name))
    assert_holds(cache.open_store(f"{server.url}/{name}"), WANTED)
    assert_holds(cache.open_store(f"file://{tmp_path}/served/{name}"), WANTED)


@pytest.mark.parametrize("suffix", FORMATS)
def test_damage_over_http_is_found_and_fetched_again_once_it_is_mended(
    suffix: str, tmp_path: Path, server: Server
) -> None:
    path = build(tmp_path / "served" / f"store.{suffix}", WANTED)[0].path
    sound = files(path)
    damage_row(path, 2)
    store = cache.open_store(f"{server.url}/store.{suffix}")
    with pytest.raises(cache.DamagedRowError, match="image-2"):
        store.read([2])
    for name, content in sound.items():
        (path if name == "." else path / name).write_bytes(content)
    assert store.read([2])["neck"][0].tobytes() == feature(2)["neck"].tobytes()


def test_what_is_not_there_and_servers_without_ranges_are_said(tmp_path: Path, server: Server) -> None:
    with pytest.raises(cache.StoreNotFoundError, match="does not exist"):
        cache.open_store(f"{server.url}/store.zarr")
    build(tmp_path / "served" / "store.zarr", WANTED)
    server.ranges = False
    with pytest.raises(cache.FormatError, match="does not know ranges"):
        cache.open_store(f"{server.url}/store.zarr")


def test_threads_read_over_http_at_once(tmp_path: Path, server: Server) -> None:
    build(tmp_path / "served" / "store.zarr", WANTED)
    store = cache.open_store(f"{server.url}/store.zarr")
    failures: list[BaseException] = []

    def read(seed: int) -> None:
        try:
            assert_holds(store, WANTED)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"


@pytest.fixture
def slow() -> Iterator[Callable[[bytes, bytes], str]]:
    """Starts a server that sends something at once and then a byte every now and then, for ever; gives its URL."""
    ended = threading.Event()
    servers: list[tuple[socketserver.ThreadingTCPServer, threading.Thread]] = []

    def start(at_once: bytes, byte: bytes) -> str:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.recv(4096)
                with suppress(OSError):
                    self.request.sendall(at_once)
                    while not ended.wait(0.02):
                        self.request.sendall(byte)

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        servers.append((server, thread))
        thread.start()
        return f"http://127.0.0.1:{server.server_address[1]}/store.zarr"

    yield start
    ended.set()
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("at_once", "byte", "reason"),
    [
        (b"", b"", "the server has not answered within"),
        (b"HTTP/1.1 200 OK\r\n", b"x", "the server has not answered within"),
        (HEAD, b" ", "the server sent [0-9]+ bytes in"),
        (HEAD.replace(b"200 OK", b"206 Partial"), b" ", "the server sent [0-9]+ bytes in"),
        (HEAD, b"", "the server is silent|[Tt]imeout on reading data"),
    ],
    ids=["silent", "a head without end", "a body without end", "a part", "silent after the head"],
)
@pytest.mark.parametrize("action", ["open", "pull"])
def test_a_server_that_trickles_or_is_silent_is_given_up(
    action: str, at_once: bytes, byte: bytes, reason: str, slow: Callable[[bytes, bytes], str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ranges, "PATIENCE_SECONDS", 0.4)
    url = slow(at_once, byte)
    began = time.monotonic()
    with pytest.raises(cache.StoreError, match=rf"http://127.*({reason}|sent something else).*"):
        cache.open_store(url) if action == "open" else cache.pull_store(url, tmp_path / "here.zarr")
    assert time.monotonic() - began < 10
    assert not (tmp_path / "here.zarr").exists()
