"""Manifests from strangers: what no store can be is refused with a reason, and nothing is written outside."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import cache
from tests.cache.making import assert_holds, build, files, rows
from tests.cache.serving import Server

WANTED = rows(range(22))


EVIL = {"size": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}


def forge_manifest(url: Path, name: str, entry: Any = EVIL) -> None:
    """Push a store and name one more file in its manifest."""
    cache.push_store(build(url.parent / "mine.zarr", WANTED)[0].path, str(url))
    manifest = json.loads((url / "manifest.json").read_text())
    manifest["files"][name] = entry
    (url / "manifest.json").write_text(json.dumps(manifest))


OUTSIDE = ["../evil", "/etc/evil", "a/../../evil", "a//b", "./a", "..", "", "a\\b", "a\nb", "a\0b"]


@pytest.mark.parametrize("name", [*OUTSIDE, "a" * 300, "a/" * 20 + "b", "a/" * 3000 + "b"])
def test_a_manifest_that_names_no_file_inside_a_store_is_refused(name: str, tmp_path: Path) -> None:
    forge_manifest(tmp_path / "bucket", name)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(cache.UntrustedStoreError, match="no file inside a store"):
        cache.pull_store(str(tmp_path / "bucket"), tmp_path / "theirs.zarr")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["zarr.json/x", "neck/zarr.json/x/y", "neck", "store.h5"])
def test_files_that_lie_in_the_way_of_each_other_are_refused(name: str, tmp_path: Path) -> None:
    forge_manifest(tmp_path / "bucket", name)
    with pytest.raises(cache.UntrustedStoreError, match="a file in its way"):
        cache.pull_store(str(tmp_path / "bucket"), tmp_path / f"theirs.{'h5' if name == 'store.h5' else 'zarr'}")


@pytest.mark.parametrize(
    "entry", [{**EVIL, "size": 10**400}, {**EVIL, "size": 2**63}, {**EVIL, "sha256": 5}, {**EVIL, "sha256": "x"}, 5, {}]
)
def test_an_impossible_size_or_digest_is_refused(entry: Any, tmp_path: Path) -> None:
    forge_manifest(tmp_path / "bucket", "a", entry)
    with pytest.raises(cache.FormatError, match=r"manifest is malformed .*push the store again"):
        cache.pull_store(str(tmp_path / "bucket"), tmp_path / "theirs.zarr")


def test_more_than_the_disk_holds_is_refused(tmp_path: Path) -> None:
    forge_manifest(tmp_path / "bucket", "a", {**EVIL, "size": 2**63 - 1})
    with pytest.raises(cache.NoSpaceError, match="make space"):
        cache.pull_store(str(tmp_path / "bucket"), tmp_path / "theirs.zarr")


def test_a_file_that_is_named_and_not_there_is_said(tmp_path: Path, server: Server) -> None:
    forge_manifest(tmp_path / "served" / "s", "a")
    for url in (f"{server.url}/s", str(tmp_path / "served" / "s")):
        with pytest.raises(cache.FormatError, match=r"s/a is named in the manifest and is not there; push"):
            cache.pull_store(url, tmp_path / "theirs.zarr")
    (tmp_path / "served" / "s" / "a").mkdir()
    with pytest.raises(cache.FormatError, match=r"s/a is named in the manifest and is not there; push"):
        cache.pull_store(url, tmp_path / "theirs.zarr")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"manifest": 2}', '{"manifest": 1, "files": []}', "[" * 100_000])
def test_a_malformed_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "manifest.json").write_text(text)
    with pytest.raises(cache.FormatError):
        cache.pull_store(str(tmp_path / "bucket"), tmp_path / "theirs.zarr")


def test_a_store_is_pulled_after_another_one_left_files_in_its_way(tmp_path: Path) -> None:
    forge_manifest(tmp_path / "bucket", "zarr.json.unfinished/deep/x")
    with pytest.raises(cache.FormatError, match="is not there"):
        cache.pull_store(str(tmp_path / "bucket"), tmp_path / "theirs.zarr")
    left = tmp_path / "theirs.zarr.partial" / "pull" / "store.zarr"
    for name in ("neck", "zarr.json", "README.md"):
        (left / name).rename(left / f"{name}.moved")
    (left / "zarr.json" / "x").mkdir(parents=True)
    (left / "neck").write_text("a file")
    (left / "README.md").symlink_to(tmp_path / "elsewhere")
    (left / "gone").symlink_to(tmp_path)
    cache.push_store(tmp_path / "mine.zarr", str(tmp_path / "bucket"))
    assert_holds(cache.pull_store(str(tmp_path / "bucket"), tmp_path / "theirs.zarr"), WANTED)
    assert files(tmp_path / "theirs.zarr") == files(tmp_path / "mine.zarr")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["zarr.json.unfinished", ".unfinished", "unfinished"])
def test_a_store_with_a_file_too_many_gets_no_name(name: str, tmp_path: Path) -> None:
    forge_manifest(tmp_path / "bucket", name)
    (tmp_path / "bucket" / name).write_bytes(b"evil")
    with pytest.raises(cache.FormatError, match="not part of the store"):
        cache.pull_store(str(tmp_path / "bucket"), tmp_path / "theirs.zarr")
    assert not (tmp_path / "theirs.zarr").exists()
