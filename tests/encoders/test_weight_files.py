"""Published checkpoints: downloads from a server on this machine that stops, starts over and lies as asked."""

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

from pipeline import download
from pipeline.encoders import PUBLISHED, checkpoint_path, family_of, fetch_checkpoint, weight_files
from pipeline.encoders.weight_files import Published
from pipeline.errors import CheckpointError, ConfigError

CONTENT = bytes(range(256)) * 12_000  # 3 MB, three blocks
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


@dataclass
class Server:
    """A server of one file, and what was asked of it."""

    url: str = ""
    content: bytes = CONTENT
    ranges: bool = True
    break_after: list[int] = field(default_factory=list)  # bytes of each answer to come, then whole ones
    status: int | None = None
    asked: list[str | None] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.asked.append(wanted)
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and state.ranges else 0
            if state.status:
                self.send_error(state.status)
                return
            body = state.content[start:]
            if not body:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(state.content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(state.content) - 1}/{len(state.content)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.break_after.pop(0) if state.break_after else None])

        def log_message(self, format: str, *args: Any) -> None:
            """Be quiet."""

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{web.server_address[1]}/weights.pth?download=1"
    monkeypatch.setattr(weight_files, "PUBLISHED", {"sam_x": Published("sam_vit_b", state.url, DIGEST)})
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    thread = threading.Thread(target=web.serve_forever, args=(0.01,))
    thread.start()
    yield state
    web.shutdown()
    thread.join()
    web.server_close()


def test_it_is_fetched_once_for_all_projects(server: Server, user_folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = fetch_checkpoint("sam_x", progress=lambda task, done, total, **info: seen.append((task, done, total)))
    assert path == user_folder / "weights" / "weights.pth" == checkpoint_path("sam_x")
    assert path.read_bytes() == CONTENT
    assert seen[-1] == ("download", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})
    assert list(path.parent.iterdir()) == [path]
    assert fetch_checkpoint("sam_x") == path
    assert server.asked == [None]


def test_a_broken_connection_is_continued_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.break_after = [1_500_000, 1_000_000]
    assert fetch_checkpoint("sam_x", tmp_path).read_bytes() == CONTENT
    assert server.asked[0] is None
    starts = [int(asked.removeprefix("bytes=").removesuffix("-")) for asked in server.asked[1:] if asked]
    assert len(starts) == 2
    assert 0 < starts[0] <= 1_500_000 < starts[1] <= 2_500_000


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("have", [1, 2_000_000, len(CONTENT)])
def test_a_stopped_download_is_continued_or_begun_anew(server: Server, tmp_path: Path, have: int, ranges: bool) -> None:
    (tmp_path / "weights.pth.part").write_bytes(CONTENT[:have])
    server.ranges = ranges
    assert fetch_checkpoint("sam_x", tmp_path).read_bytes() == CONTENT
    assert server.asked == [f"bytes={have}-"]


def test_a_part_of_something_longer_is_dropped(server: Server, tmp_path: Path) -> None:
    (tmp_path / "weights.pth.part").write_bytes(CONTENT + b"more")
    assert fetch_checkpoint("sam_x", tmp_path).read_bytes() == CONTENT


def test_wrong_content_never_gets_the_name(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"!"
    with pytest.raises(CheckpointError, match=rf"what came has the digest sha256:\w+ and should have {DIGEST}"):
        fetch_checkpoint("sam_x", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_file_of_that_name_is_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"weights\.pth: its digest is .*; move it away"):
        fetch_checkpoint("sam_x", tmp_path)
    assert (tmp_path / "weights.pth").read_bytes() == b"mine"
    assert server.asked == []


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (503, download.ATTEMPTS)])
def test_a_server_that_refuses_is_named(server: Server, tmp_path: Path, status: int, requests: int) -> None:
    server.status = status
    with pytest.raises(CheckpointError, match=f"{re.escape(server.url)} cannot be downloaded .*{status}"):
        fetch_checkpoint("sam_x", tmp_path)
    assert len(server.asked) == requests


def test_without_a_network_the_message_says_which_file_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "http://127.0.0.1:1/weights.pth"
    monkeypatch.setattr(weight_files, "PUBLISHED", {"sam_x": Published("sam_vit_b", url, DIGEST)})
    with pytest.raises(CheckpointError) as caught:
        fetch_checkpoint("sam_x", tmp_path)
    assert str(caught.value).startswith(f"{url} cannot be downloaded (")
    assert f"fetch that file elsewhere and put it at {tmp_path / 'weights.pth'} ({DIGEST})" in str(caught.value)


def test_names_are_checked_and_lead_to_known_architectures() -> None:
    with pytest.raises(ConfigError, match=r"no published checkpoint 'sam'; valid: sam_vit_b, .*, medsam"):
        checkpoint_path("sam")
    for checkpoint in PUBLISHED.values():
        assert checkpoint.architecture in family_of(checkpoint.architecture).names
        assert re.fullmatch("sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", checkpoint.digest)
        assert checkpoint.file_name.endswith((".pth", ".pt"))
