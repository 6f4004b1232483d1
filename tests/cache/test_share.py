"""Pushing, pulling, and reading stores where they lie, over a real http server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import cache
from cache.reading.ranges import file_system, http_options
from cache.sharing import share
from tests.cache.making import FORMATS, assert_holds, build, files, rows
from tests.cache.serving import Server
from tests.cache.test_damage import damage_row

WANTED = rows(range(22))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_store_travels_through_a_folder(suffix: str, tmp_path: Path) -> None:
    store, _ = build(tmp_path / f"mine.{suffix}", WANTED)
    url = str(tmp_path / "bucket" / "store")
    sent = cache.push_store(store.path, url)
    assert sent == sum(map(len, files(store.path).values()))
    assert cache.push_store(store.path, url) == 0, "nothing is sent twice"
    pulled = cache.pull_store(url, tmp_path / f"theirs.{suffix}")
    assert_holds(pulled, WANTED)
    assert files(pulled.path) == files(store.path)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_bucket_without_folders_holds_each_version(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEATURE_STORE_CACHE", str(tmp_path / "mirror"))
    url = f"memory://{tmp_path.name}/store"
    for wanted in (WANTED, WANTED[4:]):
        store, _ = build(tmp_path / f"mine.{suffix}", wanted)
        cache.push_store(store.path, url)
        assert_holds(cache.open_store(url), wanted)
        pulled = cache.pull_store(url, tmp_path / f"theirs.{suffix}")
        assert files(pulled.path) == files(store.path)
        there = MemoryFileSystem().find(f"/{tmp_path.name}/store")
        assert len(there) == len(files(store.path)) + 1, "its files, the manifest, and nothing of an older version"


def test_a_pull_asks_only_for_the_space_of_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, theirs = str(tmp_path / "bucket"), tmp_path / "theirs.zarr"
    store, _ = build(tmp_path / "mine.zarr", WANTED)
    cache.push_store(store.path, url)
    cache.pull_store(url, theirs)
    free = shutil.disk_usage(tmp_path)._replace(free=sum(map(len, files(store.path).values())) // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert_holds(cache.pull_store(url, theirs), WANTED)
    with pytest.raises(cache.NoSpaceError, match="are to be fetched and less is free"):
        cache.pull_store(url, tmp_path / "new.zarr")


def test_rows_of_samples_that_were_removed_are_told_until_a_conversion_leaves_them_behind(tmp_path: Path) -> None:
    build(tmp_path / "mine.zarr", WANTED)
    store, _ = build(tmp_path / "mine.zarr", WANTED[1:])
    assert store.removed == 1
    assert cache.what_strangers_read(store)[-1].startswith(
        "1 rows of samples that were removed or changed; `store conv"
    )
    left = cache.convert_store(store.path, tmp_path / "left.zarr")
    assert left.removed == 0
    assert not [said for said in cache.what_strangers_read(left) if "removed" in said]


def test_the_manifest_has_size_and_digest_of_every_file(tmp_path: Path) -> None:
    store, _ = build(tmp_path / "mine.zarr", WANTED)
    cache.push_store(store.path, str(tmp_path / "bucket"))
    manifest = json.loads((tmp_path / "bucket" / "manifest.json").read_text())
    assert manifest["complete"] is True
    assert manifest["files"] == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files(store.path).items()
    }


def test_a_new_version_sends_and_fetches_only_what_is_new(tmp_path: Path) -> None:
    path, url = tmp_path / "mine.zarr", str(tmp_path / "bucket")
    build(path, WANTED)
    cache.push_store(path, url)
    cache.pull_store(url, tmp_path / "theirs.zarr")
    shard = tmp_path / "theirs.zarr" / "neck" / "c.1.0.0.0"
    inode = shard.stat().st_ino
    build(path, rows(range(2, 25)))
    shards = {name for name in files(path) if "/c." in name and not name.startswith("index")}
    sent = cache.push_store(path, url)
    assert sent < sum(map(len, files(path).values()))
    fetched: list[float] = []
    pulled = cache.pull_store(
        url, tmp_path / "theirs.zarr", progress=lambda *a, **i: fetched.append(i.get("fetched", 0))
    )
    assert max(fetched) == sent, "what had to be sent has to be fetched"
    assert_holds(pulled, rows(range(2, 25)))
    assert {name for name in files(tmp_path / "bucket") if "/c." in name and not name.startswith("index")} == shards
    assert shard.stat().st_ino == inode, "a shard that is here already is shared"


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_broken_push_continues(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = build(tmp_path / f"mine.{suffix}", WANTED)
    url = f"memory://{tmp_path.name}/store"
    bucket = MemoryFileSystem()
    put = MemoryFileSystem.put_file
    sent: list[str] = []

    def breaking(self: Any, local: str, remote: str, **kwargs: Any) -> None:
        if len(sent) == 5 or suffix == "h5":
            bucket.pipe_file(remote, b"half")
            raise ConnectionError
        sent.append(remote)
        put(self, local, remote, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", breaking)
        with pytest.raises(cache.StoreError, match="check the URL and the connection"):
            cache.push_store(store.path, url)
    with pytest.raises(cache.FormatError, match="push that is not finished"):
        cache.pull_store(url, tmp_path / f"theirs.{suffix}")
    total = sum(map(len, files(store.path).values()))
    again = cache.push_store(store.path, url)
    assert again == total - sum(bucket.size(name) for name in sent)
    assert_holds(cache.pull_store(url, tmp_path / f"theirs.{suffix}"), WANTED)


def test_a_push_to_a_folder_that_breaks_shows_only_whole_files_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = build(tmp_path / "mine.zarr", WANTED)
    bucket, blocks = tmp_path / "bucket", share._blocks
    opened: list[Path] = []

    def breaking(path: Path) -> Iterator[bytes]:
        opened.append(path)
        yield from blocks(path)
        if len(opened) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(share, "_blocks", breaking)
        with pytest.raises(KeyboardInterrupt):
            cache.push_store(store.path, str(bucket))
    whole = files(store.path)
    there = {name: content for name, content in files(bucket).items() if name != "manifest.json"}
    assert len(there) == 5
    assert there.items() <= whole.items()
    again = cache.push_store(store.path, str(bucket))
    assert again == sum(map(len, whole.values())) - sum(map(len, there.values()))
    assert_holds(cache.pull_store(str(bucket), tmp_path / "theirs.zarr"), WANTED)


def test_a_push_leaves_other_names_of_what_was_there_as_they_were(tmp_path: Path) -> None:
    path, bucket, kept = tmp_path / "mine.zarr", tmp_path / "bucket", tmp_path / "kept"
    build(path, WANTED)
    cache.push_store(path, str(bucket))
    shutil.copytree(bucket, kept, copy_function=os.link)
    before = files(kept)
    (bucket / "manifest.json").unlink()
    (bucket / "manifest.json").write_text("{}")  # nothing there is trusted: all is sent again
    os.link(bucket / "manifest.json", tmp_path / "linked.json")
    build(path, WANTED[3:])
    cache.push_store(path, str(bucket))
    assert files(kept) == before
    assert (tmp_path / "linked.json").read_text() == "{}"


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("place", ["itself", "inside", "around", "link"])
def test_a_store_is_not_pushed_into_itself_or_around_itself(suffix: str, place: str, tmp_path: Path) -> None:
    path = build(tmp_path / "home" / f"mine.{suffix}", WANTED)[0].path
    (tmp_path / "link").symlink_to(tmp_path / "home")
    (tmp_path / "home" / "manifest.json").write_text("{}")  # not even over one that nobody can read
    places = {"itself": path, "inside": path / "neck", "around": path.parent, "link": tmp_path / "link" / path.name}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(cache.StoreError, match="push to a folder of its own"):
        cache.push_store(path, str(places[place]))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("what", ["store", "strangers", "file", "bucket"])
def test_a_push_takes_no_place_that_no_push_made(what: str, tmp_path: Path) -> None:
    path = build(tmp_path / "mine.zarr", WANTED)[0].path
    url = str(place := tmp_path / "place.zarr")
    match what:
        case "store":
            build(place, rows(range(3)))
        case "strangers":
            place.mkdir()
            (place / "thesis.txt").write_text("mine")
        case "file":
            place.write_text("mine")
        case "bucket":
            url = f"memory://{tmp_path.name}/place"
            MemoryFileSystem().pipe_file(f"/{tmp_path.name}/place/thesis.txt", b"mine")
    before = files(tmp_path)
    with pytest.raises(cache.StoreError, match=r"name (a new or empty|another) place"):
        cache.push_store(path, url)
    assert files(tmp_path) == before
    assert len(MemoryFileSystem().find(f"/{tmp_path.name}")) == (what == "bucket")


def test_a_push_takes_a_place_that_holds_only_hidden_files(tmp_path: Path) -> None:
    path = build(tmp_path / "mine.zarr", WANTED)[0].path
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / ".gitattributes").write_text("*.h5 filter=lfs")
    assert cache.push_store(path, str(tmp_path / "hub")) > 0


def test_a_push_follows_no_link_out_of_its_place(tmp_path: Path) -> None:
    path = build(tmp_path / "mine.zarr", WANTED)[0].path
    cache.push_store(path, str(tmp_path / "bucket"))
    (tmp_path / "bucket" / "neck").rename(tmp_path / "elsewhere")
    (tmp_path / "bucket" / "neck").symlink_to(tmp_path / "elsewhere")
    build(path, WANTED[3:])
    before = files(tmp_path)
    with pytest.raises(cache.StoreError, match="neck is a link"):
        cache.push_store(path, str(tmp_path / "bucket"))
    assert files(tmp_path) == before


@pytest.mark.parametrize("url", ["", " "])
def test_an_empty_url_is_no_place(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path / "mine.zarr", WANTED)[0].path
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for attempt in (lambda: cache.push_store(path, url), lambda: cache.pull_store(url, tmp_path / "pulled.zarr")):
        with pytest.raises(cache.StoreError, match="the URL is empty; name a folder"):
            attempt()
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("name", ["key", "neck/key.pseudonyms.csv", "manifest.json", "notes"])
def test_what_somebody_put_into_a_store_is_not_sent(name: str, tmp_path: Path) -> None:
    path = build(tmp_path / "mine.zarr", WANTED)[0].path
    (path / name).mkdir() if name == "notes" else (path / name).write_text("secret")
    with pytest.raises(cache.UntrustedStoreError, match=rf"{path / name}.* not part of the store; nothing is sent"):
        cache.push_store(path, str(tmp_path / "bucket"))
    assert not (tmp_path / "bucket").exists()


@pytest.mark.parametrize(
    "kind", [ConnectionRefusedError, socket.gaierror, type("ConnectError", (Exception,), {"__module__": "httpx"})]
)
def test_a_server_that_cannot_be_reached_is_said(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "no way"

    def fail(url: str) -> None:
        raise kind(reason)

    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    with pytest.raises(cache.StoreError, match=r"hf://x: no way; check the URL and the connection"):
        file_system("hf://x")


def test_a_broken_pull_continues(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = build(tmp_path / "mine.zarr", WANTED)
    cache.push_store(store.path, str(tmp_path / "served" / "s"))
    target = tmp_path / "theirs.zarr"

    def stop(task: str, done: int, total: int, **info: Any) -> None:
        if task == "pull" and done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.pull_store(f"{server.url}/s", target, progress=stop)
    assert not target.exists()
    server.requests.clear()
    assert_holds(cache.pull_store(f"{server.url}/s", target), WANTED)
    assert len(server.requests) == 1 + len(files(store.path)) - 7


def test_pulling_needs_no_ranges(tmp_path: Path, server: Server) -> None:
    server.ranges = False
    store, _ = build(tmp_path / "mine.h5", WANTED)
    cache.push_store(store.path, str(tmp_path / "served" / "s"))
    assert_holds(cache.pull_store(f"{server.url}/s", tmp_path / "theirs.h5"), WANTED)
    with pytest.raises(cache.StoreError, match="suffix"):
        cache.pull_store(f"{server.url}/s", tmp_path / "theirs.zarr")


def test_what_was_damaged_on_the_way_gets_no_name(tmp_path: Path) -> None:
    store, _ = build(tmp_path / "mine.zarr", WANTED)
    url = tmp_path / "bucket"
    cache.push_store(store.path, str(url))
    damage_row(url, 3)
    with pytest.raises(cache.FormatError, match=r"not the file that its manifest .*delete it there") as said:
        cache.pull_store(str(url), tmp_path / "theirs.zarr")
    assert not (tmp_path / "theirs.zarr").exists()
    Path(str(said.value).partition(" is not the file")[0]).unlink()
    assert cache.push_store(store.path, str(url)) > 0, "what the message says mends it"
    assert_holds(cache.pull_store(str(url), tmp_path / "theirs.zarr"), WANTED)


def test_a_damaged_store_is_not_sent(tmp_path: Path) -> None:
    store, _ = build(tmp_path / "mine.zarr", WANTED)
    damage_row(store.path, 3)
    with pytest.raises(cache.FormatError, match=r"mine.zarr is damaged \(.*nothing is sent: run 'store repair'"):
        cache.push_store(store.path, str(tmp_path / "bucket"))
    assert not (tmp_path / "bucket").exists()


def test_a_damaged_store_that_another_version_pushed_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = build(tmp_path / "mine.zarr", WANTED)
    damage_row(store.path, 3)
    with monkeypatch.context() as unchecked:
        unchecked.setattr(share, "verify", lambda path, progress: ())
        cache.push_store(store.path, str(tmp_path / "bucket"))
    with pytest.raises(cache.FormatError, match="damaged"):
        cache.pull_store(str(tmp_path / "bucket"), tmp_path / "theirs.zarr")
    assert not (tmp_path / "theirs.zarr").exists()


def test_too_many_files_are_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = build(tmp_path / "mine.zarr", WANTED)
    monkeypatch.setattr(share, "MAX_MANIFEST_BYTES", 1000)
    with pytest.raises(cache.StoreError, match=r"too many to share; write it with larger shards"):
        cache.push_store(store.path, str(tmp_path / "bucket"))
    assert not (tmp_path / "bucket").exists()


@pytest.mark.parametrize("kind", ["link", "folder link", "linked shard", "dangling link", "fifo"])
def test_nothing_is_sent_of_a_store_that_holds_more_than_plain_files(kind: str, tmp_path: Path) -> None:
    path = build(tmp_path / "stranger.zarr", WANTED)[0].path
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_text("secret")
    odd, shard = path / "neck" / "notes", path / "neck" / "c.0.0.0.0"
    match kind:
        case "link":
            odd.symlink_to(tmp_path / "secrets" / "key")
        case "folder link":
            odd.symlink_to(tmp_path / "secrets", target_is_directory=True)
        case "linked shard":
            odd = shard
            shard.rename(tmp_path / "shard")
            shard.symlink_to(tmp_path / "shard")
        case "dangling link":
            odd.symlink_to(tmp_path / "nowhere")
        case "fifo":
            os.mkfifo(odd)
    with pytest.raises(cache.UntrustedStoreError, match=rf"{odd} is .*a store holds only files and folders"):
        cache.push_store(path, str(tmp_path / "bucket"))
    assert not (tmp_path / "bucket").exists()


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_store_is_sent_by_a_link_of_its_owner(suffix: str, tmp_path: Path) -> None:
    build(tmp_path / f"mine.{suffix}", WANTED)
    (tmp_path / f"newest.{suffix}").symlink_to(tmp_path / f"mine.{suffix}")
    cache.push_store(tmp_path / f"newest.{suffix}", str(tmp_path / "bucket"))
    assert_holds(cache.pull_store(str(tmp_path / "bucket"), tmp_path / f"theirs.{suffix}"), WANTED)


def test_no_manifest_and_no_protocol_are_said(tmp_path: Path) -> None:
    with pytest.raises(cache.FormatError, match=r"no manifest\.json"):
        cache.pull_store(str(tmp_path / "nothing"), tmp_path / "theirs.zarr")
    with pytest.raises(cache.StoreError, match="gopher"):
        cache.pull_store("gopher://x/y", tmp_path / "theirs.zarr")


def test_pulling_over_another_fingerprint_is_refused(tmp_path: Path) -> None:
    store, _ = build(tmp_path / "mine.zarr", WANTED)
    cache.push_store(store.path, str(tmp_path / "bucket"))
    other = cache.Fingerprint({"encoder": "another"})
    build(tmp_path / "theirs.zarr", rows(range(2)), fingerprint=other)
    with pytest.raises(cache.FingerprintMismatchError):
        cache.pull_store(str(tmp_path / "bucket"), tmp_path / "theirs.zarr")
    assert cache.open_store(tmp_path / "theirs.zarr").fingerprint == other
    assert_holds(cache.pull_store(str(tmp_path / "bucket"), tmp_path / "theirs.zarr", replace=True), WANTED)


@pytest.mark.parametrize("digests", [True, False])
def test_pulling_over_another_data_set_is_refused(tmp_path: Path, digests: bool) -> None:
    store, _ = build(tmp_path / "mine.zarr", WANTED)
    cache.push_store(store.path, str(tmp_path / "bucket"))
    theirs, _ = build(tmp_path / "theirs.zarr", rows(range(100, 103)), digests=digests)
    with pytest.raises(cache.StoreError, match=r"theirs\.zarr holds 3 rows, and none of .*another data set's\. Choose"):
        cache.pull_store(str(tmp_path / "bucket"), theirs.path)
    assert cache.open_store(theirs.path).ids == theirs.ids
    assert_holds(cache.pull_store(str(tmp_path / "bucket"), theirs.path, replace=True), WANTED)


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_no_store_is_never_replaced(suffix: str, tmp_path: Path) -> None:
    store, _ = build(tmp_path / f"mine.{suffix}", WANTED)
    cache.push_store(store.path, str(tmp_path / "bucket"))
    theirs = tmp_path / f"theirs.{suffix}"
    notes = theirs / "notes.txt" if suffix == "zarr" else theirs
    notes.parent.mkdir(exist_ok=True)
    notes.write_text("the only copy of something")
    for replace in (False, True):
        with pytest.raises(cache.StoreError, match="is no feature store; move it away, or choose another name"):
            cache.pull_store(str(tmp_path / "bucket"), theirs, replace=replace)
    assert notes.read_text() == "the only copy of something"
    notes.unlink()
    assert_holds(cache.pull_store(str(tmp_path / "bucket"), theirs, replace=True), WANTED)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_damaged_store_is_replaced_where_that_is_asked_for(suffix: str, tmp_path: Path) -> None:
    store, _ = build(tmp_path / f"mine.{suffix}", WANTED)
    cache.push_store(store.path, str(tmp_path / "bucket"))
    root = store.path / "zarr.json" if suffix == "zarr" else store.path
    root.write_bytes(root.read_bytes()[:100])
    assert_holds(cache.pull_store(str(tmp_path / "bucket"), store.path, replace=True), WANTED)


def test_a_push_sends_nothing_that_a_pull_would_refuse(tmp_path: Path) -> None:
    store, _ = build(tmp_path / "store.zarr", rows(range(3)))
    stray = store.path / "notes\u00e4.txt"
    stray.write_text("mine")
    with pytest.raises(cache.UntrustedStoreError, match="is no file inside a store; delete it there"):
        cache.push_store(store.path, (tmp_path / "there").as_uri())
    assert not (tmp_path / "there").exists()
    stray.unlink()
    assert cache.push_store(store.path, (tmp_path / "there").as_uri()) > 0


@pytest.mark.parametrize(
    "text", ["{}", "no JSON", '{"manifest": 1, "version": "", "complete": true, "files": {"../x": 1}}']
)
def test_a_push_takes_the_place_of_a_manifest_that_nobody_can_read(text: str, tmp_path: Path) -> None:
    store, _ = build(tmp_path / "store.zarr", wanted := rows(range(3)))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "manifest.json").write_text(text)
    cache.push_store(store.path, (tmp_path / "there").as_uri())
    assert_holds(cache.pull_store((tmp_path / "there").as_uri(), tmp_path / "pulled.zarr"), wanted)


@pytest.mark.parametrize("url", ["http://localhost:99999/x", "http://[::1/x", f"http://{'a' * 70}/x", "http:///x"])
def test_a_url_that_is_none_is_said_so(url: str, tmp_path: Path) -> None:
    for attempt in (lambda: cache.open_store(url), lambda: cache.pull_store(url, tmp_path / "pulled.zarr")):
        with pytest.raises(cache.StoreError, match="check the URL"):
            attempt()


def test_a_large_file_may_take_its_time_and_a_silent_server_may_not() -> None:
    fs, _ = file_system("http://localhost/x")
    patience = http_options(fs)["timeout"]
    assert patience.total is None
    assert 0 < patience.sock_read <= 60
    assert 0 < patience.sock_connect <= 60
