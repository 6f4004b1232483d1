"""Reading where a store lies: answers without an end, and a folder of kept rows that is deleted, shared or full."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cache
from cache.formats import mapped
from cache.reading import ranges, remote
from tests.cache.making import FORMATS, ROWS_PER_SHARD, TAPS, assert_holds, build, feature, files, rows

WANTED = rows(range(22))
ENDLESS_BYTES = 256 << 20


class Mirrored:
    """A store that is read by URL, and the requests that reading it takes."""

    def __init__(self, path: Path, mirror: Path) -> None:
        self.path = path
        self.url = f"file://{path}"
        self.mirror = mirror
        self.requests: list[tuple[str, int, int]] = []

    def rows_requested(self) -> int:
        return len([name for name, *_ in self.requests if "/c." in name and not name.startswith("index")])


@pytest.fixture
def mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mirrored:
    monkeypatch.setenv("FEATURE_STORE_CACHE", str(tmp_path / "mirror"))
    build(tmp_path / "store.zarr", WANTED)
    made = Mirrored(tmp_path / "store.zarr", tmp_path / "mirror")
    fetch = remote.RemoteFile.fetch

    def counted(
        self: remote.RemoteFile, spans: Sequence[tuple[str, int, int]], put: Callable[[int, bytes], None]
    ) -> None:
        made.requests += spans
        fetch(self, spans, put)

    monkeypatch.setattr(remote.RemoteFile, "fetch", counted)
    return made


def assert_reads(store: cache.Store, numbers: Sequence[int], **kwargs: Any) -> None:
    read = store.read(numbers, **kwargs)
    for i, number in enumerate(numbers):
        for name in TAPS:
            assert read[name][i].tobytes() == feature(number)[name].tobytes()


@pytest.mark.parametrize("verify", [True, False])
def test_kept_rows_that_are_deleted_while_a_store_is_open_are_fetched_again(verify: bool, mirrored: Mirrored) -> None:
    store = cache.open_store(mirrored.url)
    assert_reads(store, [0, 1])
    shutil.rmtree(mirrored.mirror)
    assert_reads(store, [2], verify=verify)
    assert_reads(store, [0, 2, 3], verify=verify)
    assert_reads(store, [9], verify=verify)
    before = mirrored.rows_requested()
    assert_reads(cache.open_store(mirrored.url), [0, 2, 3, 9], verify=verify)
    assert mirrored.rows_requested() == before, "what was fetched after the deletion is kept as well"


def test_rows_that_were_fetched_stay_whatever_other_threads_meet(mirrored: Mirrored) -> None:
    opened = remote.open_remote(mirrored.url)
    opened.rows.fetch(["neck"], np.array([0, 1]))
    shutil.rmtree(mirrored.mirror)
    other = threading.Thread(target=opened.rows.fetch, args=(["neck"], np.array([3])))
    other.start()
    other.join()
    data = opened.rows.file("neck", 0).data
    start = int(opened.rows.places("neck", np.array([1])).offsets[0])
    assert data[start : start + TAPS["neck"].row_bytes].tobytes() == feature(1)["neck"].tobytes()


@pytest.mark.parametrize("verify", [True, False])
def test_a_kept_file_that_was_cut_short_is_made_anew(verify: bool, mirrored: Mirrored) -> None:
    assert_holds(cache.open_store(mirrored.url), WANTED)
    for file in mirrored.mirror.rglob("c.*"):
        os.truncate(file, 10)
    assert_reads(cache.open_store(mirrored.url), range(22), verify=verify)


def test_a_kept_file_that_is_cut_short_while_it_is_mapped_is_made_anew(mirrored: Mirrored) -> None:
    store = cache.open_store(mirrored.url)
    assert_holds(store, WANTED)
    for file in mirrored.mirror.rglob("c.*"):
        os.truncate(file, 10)
    with pytest.raises(cache.DamagedRowError, match="image-1"):
        store.read([1])
    assert_reads(store, [1, 2])


def test_processes_share_what_they_have_fetched(mirrored: Mirrored) -> None:
    one, other = cache.open_store(mirrored.url), cache.open_store(mirrored.url)
    for number in range(0, 22, 2):
        assert_reads(one, [number])
        assert_reads(other, [number, number + 1])
    mirrored.requests.clear()
    assert_reads(one, range(22), verify=False)
    assert_reads(other, range(22), verify=False)
    assert mirrored.rows_requested() == 0


def test_a_kept_row_that_is_damaged_is_fetched_again_by_all(mirrored: Mirrored) -> None:
    one, other = cache.open_store(mirrored.url), cache.open_store(mirrored.url)
    assert_reads(one, [5])
    assert_reads(other, [5])
    (file,) = mirrored.mirror.glob("*/neck/c.1.0.0.0")
    content = bytearray(file.read_bytes())
    content[content.find(feature(5)["neck"].tobytes())] ^= 1
    file.write_bytes(content)
    with pytest.raises(cache.DamagedRowError, match="image-5"):
        one.read([5])
    assert_reads(one, [5])
    assert_reads(other, [5])
    assert_reads(cache.open_store(mirrored.url), [5], verify=False)


@pytest.mark.parametrize("failing", range(1, 5))
def test_a_full_disk_is_said_and_leaves_no_mark_of_a_row_that_is_not_there(
    failing: int, mirrored: Mirrored, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = cache.open_store(mirrored.url)
    assert_reads(store, [8])
    write, calls = os.pwrite, [0]

    def half(handle: int, data: Any, position: int) -> int:
        calls[0] += 1
        if calls[0] == failing:
            return (
                write(handle, bytes(data)[: len(data) // 2], position)
                if len(data) > 1
                else write(handle, data, position)
            )
        if calls[0] > failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data, position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", half)
        with pytest.raises(cache.StoreError, match=r"mirror.*no space left.*\$FEATURE_STORE_CACHE") as caught:
            store.read([9, 11])
        assert_reads(store, [8])
    assert not isinstance(caught.value, cache.DamagedRowError)
    assert_reads(cache.open_store(mirrored.url), [8, 9, 10, 11], verify=False)
    assert_reads(store, [8, 9, 10, 11], verify=False)


def test_a_folder_that_cannot_be_written_is_said(mirrored: Mirrored) -> None:
    mirrored.mirror.write_text("a file is in its place")
    with pytest.raises(cache.StoreError, match=r"mirror.*\$FEATURE_STORE_CACHE"):
        cache.open_store(mirrored.url)
    mirrored.mirror.unlink()
    store = cache.open_store(mirrored.url)
    shutil.rmtree(mirrored.mirror)
    mirrored.mirror.write_text("a file is in its place")
    with pytest.raises(cache.StoreError, match=r"mirror.*\$FEATURE_STORE_CACHE"):
        store.read([0])


def test_many_shards_cost_few_descriptors(mirrored: Mirrored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_MAPS", 3)
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208 - an entry may be gone before it is looked at
    store = cache.open_store(mirrored.url)
    for number in range(22):
        assert_reads(store, [number])
    assert_holds(store, WANTED)
    assert len(os.listdir("/dev/fd")) <= before + 3 + 2  # noqa: PTH208
    assert mirrored.rows_requested() <= 22 * len(TAPS), "maps are let go of, not rows"


def test_maps_are_let_go_of_when_descriptors_are_used_up(mirrored: Mirrored, monkeypatch: pytest.MonkeyPatch) -> None:
    store = cache.open_store(mirrored.url)
    assert_reads(store, [0, 4, 8])
    open_file, rows_of = os.open, store._opened.rows
    assert isinstance(rows_of, remote.RemoteRows)

    def scarce(path: Any, *arguments: Any, **options: Any) -> int:
        if "mirror" in os.fsdecode(path) and len(rows_of._copies) >= 6:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(os, "open", scarce)
    assert_reads(store, [12, 16, 20])
    monkeypatch.setattr(os, "open", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(cache.StoreError, match="ulimit -n"):
        rows_of.fetch(["neck"], np.array([5]))


def test_kept_files_may_be_hollow_as_no_store_is(mirrored: Mirrored, monkeypatch: pytest.MonkeyPatch) -> None:
    store = cache.open_store(mirrored.url)
    monkeypatch.setattr(mapped, "_HOLLOW_BYTES", -1)
    monkeypatch.setattr(mapped, "_MOST_HOLLOW", 0)
    assert_reads(store, [3, 7])


@pytest.mark.parametrize("verify", [True, False])
def test_a_shard_that_ends_early_gives_its_whole_rows_and_an_error(verify: bool, mirrored: Mirrored) -> None:
    store = cache.open_store(mirrored.url)
    for name in TAPS:
        os.truncate(mirrored.path / name / "c.1.0.0.0", 2 * (TAPS[name].row_bytes + 4) + 5)
    with pytest.raises(cache.FormatError, match=r"c\.1\.0\.0\.0 ends before byte .*push it again"):
        store.read([4, 5, 6], verify=verify)
    assert_reads(store, [4, 5], verify=verify)


class Answer(BaseHTTPRequestHandler):
    """Whatever the test says, to every request; how much of it was taken is written down."""

    def log_message(self, *arguments: Any) -> None:
        """Nothing: pytest shows the log of a failed test."""

    def do_GET(self) -> None:
        self.server.asked.append(self.headers.get("Range"))  # type: ignore[attr-defined]
        status, headers, blocks = self.server.answer(self.path)  # type: ignore[attr-defined]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for block in blocks:
                self.wfile.write(block)
                self.server.sent += len(block)  # type: ignore[attr-defined]
        except OSError:
            return

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()


class Hostile(ThreadingHTTPServer):
    """A server that answers as it likes."""

    def __init__(self, answer: Callable[[str], tuple[int, dict[str, str], Iterator[bytes]]]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.answer = answer
        self.asked: list[str | None] = []
        self.sent = 0
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def answering(answer: Callable[[str], tuple[int, dict[str, str], Iterator[bytes]]]) -> Iterator[Hostile]:
    with Hostile(answer) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()


def endless() -> Iterator[bytes]:
    for _ in range(ENDLESS_BYTES >> 16):
        yield bytes(1 << 16)


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (206, {"Content-Range": "bytes 0-9/10"}),
        (206, {"Content-Range": "bytes 0-9/10", "Content-Length": str(ENDLESS_BYTES)}),
        (206, {"Content-Encoding": "gzip"}),
        (200, {}),
        (200, {"Content-Length": str(ENDLESS_BYTES)}),
    ],
)
def test_an_answer_without_an_end_is_refused_and_not_read(status: int, headers: dict[str, str]) -> None:
    with answering(lambda path: (status, headers, endless())) as server:
        for start, stop in ((0, 1000), (0, 1 << 20), (500, 1000)):
            server.sent = 0
            with pytest.raises(cache.FormatError, match="does not know ranges"):
                remote.RemoteFile(f"{server.url}/x").ranges("y", [(start, stop)])
            assert server.sent < 32 << 20, "what the socket holds, and not all of it"
        with pytest.raises(cache.FormatError, match="does not know ranges"):
            cache.open_store(f"{server.url}/x.zarr")


def test_an_endless_manifest_is_refused_and_not_read(tmp_path: Path) -> None:
    with answering(lambda path: (200, {}, endless())) as server:
        with pytest.raises(cache.UntrustedStoreError, match="manifest is larger than"):
            cache.pull_store(server.url, tmp_path / "x.zarr")
        assert server.sent < 64 << 20


def test_a_manifest_that_arrives_in_pieces_is_read_whole(tmp_path: Path) -> None:
    manifest = json.dumps({"manifest": 1, "version": "0" * 64, "complete": False, "files": {}}).encode()

    def pieces() -> Iterator[bytes]:
        yield manifest[:20]
        time.sleep(0.05)
        yield manifest[20:]

    with (
        answering(lambda path: (200, {}, pieces())) as server,
        pytest.raises(cache.FormatError, match="a push that is not finished"),
    ):
        cache.pull_store(server.url, tmp_path / "x.zarr")


def test_an_endless_file_is_refused_and_not_kept(tmp_path: Path) -> None:
    files = {"zarr.json": {"size": 10, "sha256": "0" * 64}}
    manifest = json.dumps({"manifest": 1, "version": "0" * 64, "complete": True, "files": files}).encode()
    with answering(lambda path: (200, {}, iter([manifest]) if path == "/manifest.json" else endless())) as server:
        with pytest.raises(cache.FormatError, match="not the file that its manifest describes"):
            cache.pull_store(server.url, tmp_path / "x.zarr")
        assert server.sent < 32 << 20


@pytest.mark.parametrize(
    ("status", "headers", "span"),
    [
        (206, {"Content-Range": "bytes 0-9/1000"}, (20, 30)),
        (206, {"Content-Range": "nonsense"}, (0, 10)),
        (200, {}, (20, 30)),
    ],
)
def test_an_answer_from_another_place_is_refused(status: int, headers: dict[str, str], span: tuple[int, int]) -> None:
    with (
        answering(lambda path: (status, headers, iter([b"0123456789"]))) as server,
        pytest.raises(cache.FormatError, match=r"/x/y: .*10 bytes from byte \d+ on.*pull the store"),
    ):
        remote.RemoteFile(f"{server.url}/x").ranges("y", [span])


def test_a_whole_file_that_is_no_longer_than_asked_for_will_do() -> None:
    with answering(lambda path: (200, {}, iter([b"01234", b"56789"]))) as server:
        assert remote.RemoteFile(server.url).ranges("y", [(0, 10), (0, 20)]) == [b"0123456789"] * 2
        assert sorted(map(str, server.asked)) == ["bytes=0-19", "bytes=0-9"]


@pytest.mark.parametrize(
    ("status", "error", "text"),
    [
        (404, cache.StoreNotFoundError, "does not exist"),
        (403, cache.StoreError, r"/y: 403.*check the URL"),
        (500, cache.StoreError, r"/y: 500.*try again"),
    ],
)
def test_a_refusal_is_said(status: int, error: type[Exception], text: str) -> None:
    with answering(lambda path: (status, {}, iter([]))) as server, pytest.raises(error, match=text):
        remote.RemoteFile(server.url).ranges("y", [(0, 10)])


def test_a_range_behind_the_end_is_empty_and_no_server_is_said(tmp_path: Path) -> None:
    with answering(lambda path: (416, {}, iter([]))) as server:
        assert remote.RemoteFile(server.url).ranges("y", [(10, 20)]) == [b""]
    with pytest.raises(cache.StoreError, match=r"check the URL and the connection"):
        cache.open_store(f"{server.url}/x.zarr")
    with pytest.raises(cache.StoreError, match="gopher"):
        cache.open_store("gopher://x/y.zarr")


@pytest.mark.parametrize("suffix", FORMATS)
def test_all_that_a_batch_lacks_is_asked_for_at_once(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer waits for the requests of both taps, both shards, and of two rows of one that lie far apart."""
    monkeypatch.setenv("FEATURE_STORE_CACHE", str(tmp_path / "mirror"))
    monkeypatch.setattr(remote, "_GAP_BYTES", 0)
    content = files(build(tmp_path / f"store.{suffix}", WANTED)[0].path)
    wanted = [0, ROWS_PER_SHARD, ROWS_PER_SHARD + 3]
    all_there, paired = threading.Barrier(len(wanted) * len(TAPS), timeout=20), [False]

    class Slow(Answer):
        def do_GET(self) -> None:
            name = self.path.removeprefix(f"/store.{suffix}").removeprefix("/") or "."
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            part = content[name][first : last + 1] if name in content else b""
            if paired[0]:
                all_there.wait()
            self.send_response(206 if part else 404)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

    with answering(lambda path: (404, {}, iter([]))) as server:
        server.RequestHandlerClass = Slow
        store = cache.open_store(f"{server.url}/store.{suffix}")
        _ = store.extents, store.slots
        for name in TAPS:
            store._opened.index.checksums(name)
        paired[0] = True
        assert_reads(store, wanted)


def test_a_failure_ends_the_requests_that_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "AT_ONCE", 2)
    with answering(lambda path: (500, {}, iter([]))) as server:
        with pytest.raises(cache.StoreError, match="500"):
            remote.RemoteFile(server.url).fetch([("y", 0, 10)] * 20, lambda number, data: None)
        assert len(server.asked) <= 2


@given(
    st.lists(st.booleans(), min_size=1, max_size=60).flatmap(
        lambda here: st.tuples(st.just(here), st.sets(st.integers(0, len(here) - 1), min_size=1))
    ),
    st.integers(0, 5),
    st.integers(1, 8),
)
def test_spans_cover_what_is_wanted_and_small_holes_beside_it(
    places: tuple[list[bool], set[int]], gap: int, most: int
) -> None:
    here, wanted = places
    spans = remote._spans(np.array(here), np.array(sorted(wanted)), gap, most)
    covered = [place for first, last in spans for place in range(first, last + 1)]
    assert covered == sorted(set(covered)), "in order, and nothing twice"
    assert all(last - first < most for first, last in spans)
    expected = {place for place in wanted if not here[place]}
    bounds = sorted({place for place, is_here in enumerate(here) if is_here} | wanted)
    if any(here):
        bounds = [-1, *bounds, len(here)]
    for before, after in pairwise(bounds):
        if after - before - 1 <= gap and wanted & {before, after}:
            expected |= set(range(before + 1, after))
    assert set(covered) == expected


def test_an_epoch_asks_for_no_row_twice_and_soon_for_nothing() -> None:
    """Batches of 16 out of 4 shards of 512 rows, of which up to 64 between two come along."""
    have = np.zeros((4, 512), np.bool_)
    rounds, asked = 0, 0
    for batch in np.random.default_rng(0).permutation(have.size).reshape(-1, 16):
        spans = [
            (shard, first, last)
            for shard in range(4)
            for first, last in remote._spans(have[shard], np.sort(batch[batch // 512 == shard] % 512), 64, 64)
        ]
        for shard, first, last in spans:
            assert not have[shard, first : last + 1].any()
            have[shard, first : last + 1] = True
            asked += last - first + 1
        assert have.reshape(-1)[batch].all()
        rounds += bool(spans)
    assert asked == have.size
    assert rounds <= 16, "of 128 batches"
