"""Downloads from a server on this machine that stops, starts and lies as asked."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import fetch_medmnist
from pipeline.data.layouts.medmnist_sets import SETS, MedMnistSet
from pipeline.errors import DataError

CONTENT = bytes(range(256)) * 12_000  # 3 MB, three blocks
MD5 = hashlib.md5(CONTENT).hexdigest()


@dataclass
class Archive:
    """A server of one file and the record of what was asked of it."""

    address: str = ""
    content: bytes = CONTENT
    ranges: bool = True
    break_after: int | None = None
    status: int | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Archive]:
    state = Archive()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.asked.append((self.path, wanted))
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and state.ranges else 0
            if state.status:
                self.send_error(state.status)
                return
            if start >= len(state.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(state.content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = state.content[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.break_after])
            if state.break_after is not None:
                self.close_connection = True
                state.break_after = None

        def log_message(self, format: str, *args: Any) -> None:
            """Be quiet."""

    monkeypatch.setitem(SETS, "breastmnist", MedMnistSet("binary", ("a", "b"), (MD5,) * 4))
    monkeypatch.setattr("pipeline.download.ATTEMPTS", 2)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_address[1]}/files"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def test_it_is_fetched_checked_and_named(archive: Archive, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = fetch_medmnist(
        "breastmnist",
        224,
        tmp_path / "new" / "data",
        archive=archive.address,
        progress=lambda task, done, total, **_: seen.append((task, done, total)),
    )
    assert path == tmp_path / "new" / "data" / "breastmnist_224.npz"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["breastmnist_224.npz"]
    assert seen[-1] == ("download", len(CONTENT), len(CONTENT))
    assert len(seen) >= 3
    assert archive.asked == [("/files/breastmnist_224.npz?download=1", None)]


def test_what_is_there_and_right_is_not_fetched_again(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "breastmnist.npz").write_bytes(CONTENT)
    assert fetch_medmnist("breastmnist", 28, tmp_path, archive=archive.address) == tmp_path / "breastmnist.npz"
    assert not archive.asked


def test_another_file_of_that_name_is_left_alone(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "breastmnist.npz").write_bytes(b"mine")
    with pytest.raises(DataError, match=rf"its digest is md5:.* and should be md5:{MD5}; move it away"):
        fetch_medmnist("breastmnist", 28, tmp_path, archive=archive.address)
    assert (tmp_path / "breastmnist.npz").read_bytes() == b"mine"


def test_a_broken_connection_is_continued_where_it_broke(archive: Archive, tmp_path: Path) -> None:
    archive.break_after = 1_500_000
    fetch_medmnist("breastmnist", 28, tmp_path, archive=archive.address)
    assert (tmp_path / "breastmnist.npz").read_bytes() == CONTENT
    assert [wanted for _, wanted in archive.asked] == [None, "bytes=1500000-"]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("have", [1, 2_000_000, len(CONTENT)])
def test_a_stopped_download_is_continued(archive: Archive, tmp_path: Path, have: int, ranges: bool) -> None:
    archive.ranges = ranges
    (tmp_path / "breastmnist.npz.part").write_bytes(CONTENT[:have])
    fetch_medmnist("breastmnist", 28, tmp_path, archive=archive.address)
    assert [p.name for p in tmp_path.iterdir()] == ["breastmnist.npz"]
    assert (tmp_path / "breastmnist.npz").read_bytes() == CONTENT
    assert [wanted for _, wanted in archive.asked] == [f"bytes={have}-"]


def test_a_part_that_is_too_long_is_dropped(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "breastmnist.npz.part").write_bytes(CONTENT + b"more")
    fetch_medmnist("breastmnist", 28, tmp_path, archive=archive.address)
    assert (tmp_path / "breastmnist.npz").read_bytes() == CONTENT


def test_wrong_content_never_gets_the_name(archive: Archive, tmp_path: Path) -> None:
    archive.content = CONTENT[::-1]
    with pytest.raises(DataError, match=r"what came has the digest md5:.*; run the command again"):
        fetch_medmnist("breastmnist", 28, tmp_path, archive=archive.address)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (503, 2)])
def test_a_server_that_refuses_is_named(archive: Archive, tmp_path: Path, status: int, requests: int) -> None:
    archive.status = status
    with pytest.raises(DataError, match=f"cannot be downloaded .the server answered {status} "):
        fetch_medmnist("breastmnist", 28, tmp_path, archive=archive.address)
    assert len(archive.asked) == requests


def test_without_a_network_the_message_says_which_file_to_put_where(archive: Archive, tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:9"
    target = re.escape(str(tmp_path / "breastmnist_64.npz"))
    expected = rf"127\.0\.0\.1:9/breastmnist_64\.npz.* cannot be downloaded .*put it at {target} \(md5:{MD5}\)"
    with pytest.raises(DataError, match=expected):
        fetch_medmnist("breastmnist", 64, tmp_path, archive=nobody)


@pytest.mark.parametrize(("name", "size_px"), [("brestmnist", 28), ("breastmnist", 32)])
def test_an_unknown_set_lists_the_known_ones(tmp_path: Path, name: str, size_px: int) -> None:
    expected = f"no set '{name}' at {size_px} px; the sets are pathmnist, .* at 28, 64, 128, 224 px"
    with pytest.raises(DataError, match=expected):
        fetch_medmnist(name, size_px, tmp_path)


def test_the_digests_are_those_of_the_real_archives(real_data: Path) -> None:
    for name, size_px in (("breastmnist", 28), ("breastmnist", 224), ("retinamnist", 28), ("pneumoniamnist", 28)):
        assert fetch_medmnist(name, size_px, real_data, archive="http://127.0.0.1:9").parent == real_data
