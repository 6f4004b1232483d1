"""Stores from strangers, forged with the right checksums: an error with a reason, in bounded time and memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import cache
from cache.description import parse_description
from cache.formats import mapped
from cache.formats.zarr_layout import metadata_files
from tests.cache.forging import Forged, Tree, exercise, sign
from tests.cache.making import FORMATS, build, feature, rows

COUNT = 6
REFUSED = (cache.FormatError, cache.UntrustedStoreError)


@pytest.fixture(params=FORMATS)
def forged(request: pytest.FixtureRequest, tmp_path: Path) -> Forged:
    return Forged(build(tmp_path / f"store.{request.param}", rows(range(COUNT)))[0].path)


def test_a_faithful_forgery_is_accepted(forged: Forged) -> None:
    """Else the tests below would prove nothing."""
    description = forged.description()
    description["provenance"]["made"] = "by a stranger"
    forged.write_description(sign(description))
    assert cache.open_store(forged.path).provenance["made"] == "by a stranger"
    forged.write_index("ids", forged.index("ids")[::-1])
    assert cache.open_store(forged.path).ids[0] == "gnp.5-egami"
    assert cache.open_store(forged.path).read([1])["neck"].tobytes() == feature(1)["neck"].tobytes()


def change(*keys: Any, to: Any) -> Callable[[Tree], None]:
    def apply(tree: Tree) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = to

    return apply


DESCRIPTIONS = {
    "rows": change("rows", to=10**15),
    "slots": change("slots", to=10**15),
    "fewer slots": change("slots", to=COUNT - 1),
    "shard rows": change("shard_rows", to=10**9),
    "no shard rows": change("shard_rows", to=0),
    "negative rows": change("rows", to=-1),
    "rows as text": change("rows", to="6"),
    "rows as truth": change("rows", to=True),
    "fractional rows": change("rows", to=6.0),
    "shape": change("taps", 0, "shape", to=[10**15, 10**15, 10**15]),
    "flat shape": change("taps", 0, "shape", to=[36]),
    "empty shape": change("taps", 0, "shape", to=[0, 3, 3]),
    "objects": change("taps", 0, "dtype", to="object"),
    "type": change("taps", 0, "dtype", to="float64"),
    "upward": change("taps", 0, "name", to="../neck"),
    "absolute": change("taps", 0, "name", to="/etc"),
    "inside": change("taps", 0, "name", to="index"),
    "no taps": change("taps", to=[]),
    "tap twice": lambda tree: tree["taps"].append(tree["taps"][0]),
    "no index": change("index", to={}),
    "strange index": change("index", "../../x", to={"shape": [1], "sha256": "00"}),
    "long ids": change("index", "ids", "shape", to=[10**15]),
    "digest as list": change("index", "ids", "sha256", to=[]),
    "version": change("format_version", to=cache.FORMAT_VERSION + 1),
    "no version": lambda tree: tree.pop("format_version"),
    "extra key": change("command", to="rm -rf /"),
    "provenance": change("provenance", to=[]),
    "fingerprint": change("fingerprint", to=None),
    "deep": change("provenance", "deep", to=json.loads("[" * 500 + "]" * 500)),
}


@pytest.mark.parametrize("what", DESCRIPTIONS)
def test_a_forged_description_is_refused(what: str, forged: Forged) -> None:
    description = forged.description()
    DESCRIPTIONS[what](description)
    forged.write_description(sign(description))
    with pytest.raises(REFUSED):
        cache.open_store(forged.path)
    exercise(forged.path)


INDEX = {
    "slot beyond the end": ("slot", np.int64, COUNT),
    "negative slot": ("slot", np.int64, -1),
    "huge slot": ("slot", np.int64, 2**62),
    "extent of nothing": ("extent", np.float32, 0.0),
    "extent of more than all": ("extent", np.float32, 1.5),
    "extent that is no number": ("extent", np.float32, np.nan),
    "id with a newline": ("ids", np.uint8, 10),
    "id with a control character": ("ids", np.uint8, 7),
    "id that is no text": ("ids", np.uint8, 255),
    "reasons that are no JSON": ("set_aside", np.uint8, 0),
}


@pytest.mark.parametrize("what", INDEX)
def test_a_forged_index_is_refused(what: str, forged: Forged) -> None:
    name, dtype, value = INDEX[what]
    data = forged.index(name).view(dtype)
    data[0] = value
    forged.write_index(name, data.view(np.uint8))

    def use() -> None:
        store = cache.open_store(forged.path)
        _ = store.ids, store.set_aside
        store.read(range(COUNT))

    with pytest.raises(REFUSED):
        use()
    exercise(forged.path)


@pytest.mark.parametrize("offset", [-1, 0, 10**18, 2**63])
def test_offsets_outside_the_file_or_into_each_other_are_refused(offset: int, tmp_path: Path) -> None:
    forged = Forged(build(tmp_path / "store.h5", rows(range(COUNT)))[0].path)
    header = forged.header()
    for name in ("neck", "index/slot"):
        forged.write_header({**header, "offsets": {**header["offsets"], name: offset}})
        with pytest.raises(REFUSED):
            cache.open_store(forged.path)
    forged.write_header({**header, "offsets": {**header["offsets"], "neck": header["offsets"]["block:31"] + 8}})
    with pytest.raises(cache.UntrustedStoreError, match="overlap"):
        cache.open_store(forged.path)


@pytest.mark.parametrize("name", ["neck", "index", "index/crc32c", "neck/c.0.0.0.0", "index/slot/c.0", "zarr.json"])
def test_links_are_not_followed(name: str, tmp_path: Path) -> None:
    path = build(tmp_path / "store.zarr", rows(range(COUNT)))[0].path
    outside = tmp_path / "outside"
    (path / name).rename(outside)
    (path / name).symlink_to(outside)
    with pytest.raises(cache.UntrustedStoreError, match="symbolic link"):
        cache.open_store(path).read([0])
    assert cache.verify(path)


def test_a_pipe_in_the_place_of_a_shard_does_not_hang(tmp_path: Path) -> None:
    path = build(tmp_path / "store.zarr", rows(range(COUNT)))[0].path
    (path / "neck" / "c.0.0.0.0").unlink()
    os.mkfifo(path / "neck" / "c.0.0.0.0")
    with pytest.raises(cache.UntrustedStoreError, match="no plain file"):
        cache.open_store(path).read([0])


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("codecs", [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip"}]),
        ("codecs", [{"name": "numcodecs.pickle"}]),
        ("data_type", "object"),
        ("shape", [10**15, 4, 3, 3]),
    ],
)
def test_arrays_that_we_did_not_write_are_refused(part: str, value: Any, tmp_path: Path) -> None:
    path = build(tmp_path / "store.zarr", rows(range(COUNT)))[0].path
    metadata = json.loads((path / "neck" / "zarr.json").read_text())
    (path / "neck" / "zarr.json").write_text(json.dumps({**metadata, part: value}, indent=2, sort_keys=True) + "\n")
    with pytest.raises(cache.FormatError, match="another shape, type or codec"):
        cache.open_store(path)


def external_link(file: h5py.File) -> None:
    del file["neck"]
    file["neck"] = h5py.ExternalLink("/etc/passwd", "/")


def soft_link(file: h5py.File) -> None:
    del file["neck"]
    file["neck"] = h5py.SoftLink("/block:31")


def virtual(file: h5py.File) -> None:
    shape = file["neck"].shape
    del file["neck"]
    layout = h5py.VirtualLayout(shape, "<f2")
    layout[:] = h5py.VirtualSource("/etc/passwd", "neck", shape)
    file.create_virtual_dataset("neck", layout)


def external_storage(file: h5py.File) -> None:
    shape = file["neck"].shape
    del file["neck"]
    file.create_dataset("neck", shape, "<f2", external=[("/etc/passwd", 0, 10_000)])


@pytest.mark.parametrize("change", [external_link, soft_link, virtual, external_storage])
def test_what_hdf5_would_fetch_from_elsewhere_is_refused(change: Callable[[h5py.File], None], tmp_path: Path) -> None:
    path = build(tmp_path / "store.h5", rows(range(COUNT)))[0].path
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(cache.FormatError, match=r"store\.h5"):
        cache.open_store(path)


@pytest.mark.parametrize("claimed", [3 * 2**30, 10**13])
def test_holes_are_not_read(claimed: int, tmp_path: Path) -> None:
    """A few kilobytes on disk that claim gigabytes: as an entry of the index, and as HDF5's structure."""
    build(tmp_path / "store.zarr", rows(range(6)))
    forged = Forged(tmp_path / "store.zarr")
    description = forged.description()
    description["index"]["ids"]["shape"] = [claimed]
    forged.write_description(sign(description))
    (forged.path / "index/ids/zarr.json").write_bytes(
        metadata_files(parse_description(sign(description), ""))["index/ids"]
    )
    os.truncate(forged.path / "index/ids/c.0", claimed + 4)
    build(tmp_path / "store.h5", rows(range(6)))
    single = Forged(tmp_path / "store.h5")
    single.write_header({**single.header(), "file_bytes": claimed})
    os.truncate(single.path, claimed)
    for path, size in ((forged.path, claimed + 4), (single.path, claimed)):
        with pytest.raises(cache.UntrustedStoreError, match=f"claims {size} bytes and is nearly all holes"):
            _ = cache.open_store(path).ids
        assert cache.verify(path)


def test_blocks_that_are_counted_late_are_no_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems count the blocks of a file seconds after it was written, or never."""
    monkeypatch.setattr(mapped, "_HOLLOW_BYTES", 1 << 16)
    dense, pieces, hollow = (tmp_path / name for name in ("dense", "pieces", "hollow"))
    dense.write_bytes(b"1" * (1 << 20))
    with pieces.open("wb") as file:
        for place in range(0, 1 << 24, 1 << 20):
            file.seek(place)
            file.write(b"1" * 8192)
    with hollow.open("wb") as file:
        file.write(b"1" * 4096)
        file.truncate(1 << 30)
    for path, nearly_empty in ((dense, False), (pieces, False), (hollow, True)):
        found = path.stat()
        late = os.stat_result(found, {"st_blocks": 1, "st_size": found.st_size})
        with path.open("rb") as file:
            assert late.st_blocks == 1
            assert mapped._nearly_empty(file.fileno(), late) is nearly_empty
            assert file.tell() == 0


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 300_000 + "]" * 300_000])
def test_deep_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "store.zarr").mkdir()
    (tmp_path / "store.zarr" / "zarr.json").write_text(text)
    with pytest.raises(cache.FormatError):
        cache.open_store(tmp_path / "store.zarr")


@pytest.mark.parametrize(("size", "reason"), [(2**21, "at most"), (2**40, "nearly all holes")])
def test_a_huge_root_is_not_read(size: int, reason: str, tmp_path: Path) -> None:
    (tmp_path / "store.zarr").mkdir()
    with (tmp_path / "store.zarr" / "zarr.json").open("wb") as file:
        file.truncate(size)
    with pytest.raises(cache.UntrustedStoreError, match=reason):
        cache.open_store(tmp_path / "store.zarr")


def test_a_story_too_long_to_be_read_back_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(cache.StoreError, match="shorten"):
        build(tmp_path / "store.zarr", rows([0]), provenance={"log": "x" * 40_000})


def test_refusing_takes_no_memory(tmp_path: Path) -> None:
    """Every forged description above, in 256 MiB of address space beyond what the process has."""
    path = build(tmp_path / "store.zarr", rows(range(COUNT)))[0].path
    forged = Forged(path)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, hard))
    try:
        for apply in DESCRIPTIONS.values():
            description = forged.description()
            apply(description)
            forged.write_description(sign(description))
            exercise(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    shutil.rmtree(path)
