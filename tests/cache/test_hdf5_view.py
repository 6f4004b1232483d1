"""A packed store that offers HDF5's own library something else than this package reads is refused by `verify`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import cache
from cache.formats.hdf5_file import read_header, structure_sha256
from tests.cache.making import TAPS, build, feature, rows

COUNT = 6


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return build(tmp_path / "store.h5", rows(range(COUNT)))[0].path


def sign(path: Path) -> None:
    """Give a file that was changed the header that it calls for, as anybody can who knows the format."""
    header, block = read_header(path, whole=False)
    header = dataclasses.replace(header, file_bytes=path.stat().st_size)
    header = dataclasses.replace(header, structure_sha256=structure_sha256(path, header, block))
    with path.open("r+b") as file:
        file.write(header.to_bytes(block))


def assert_refused(path: Path, reason: str) -> None:
    """This package reads the rows that were written, and `verify` says that others would not."""
    with cache.open_store(path) as store:
        np.testing.assert_array_equal(store.read([0])["neck"][0], feature(0)["neck"])
    assert any(reason in str(damage) for damage in cache.verify(path)), cache.verify(path)


def test_chunks_that_lead_the_library_to_other_rows(path: Path) -> None:
    header, _ = read_header(path)
    content = bytearray(path.read_bytes())
    first = header.offsets["neck"]
    addresses = [(first + i * (TAPS["neck"].row_bytes + 4)) for i in (0, 1)]
    with h5py.File(path) as file:
        base = file.userblock_size
    found = [content.index((address - base).to_bytes(8, "little")) for address in addresses]
    for at, address in zip(found, reversed(addresses), strict=True):
        content[at : at + 8] = (address - base).to_bytes(8, "little")
    path.write_bytes(content)
    sign(path)
    with h5py.File(path) as file:
        dataset: Any = file["neck"]
        np.testing.assert_array_equal(dataset[0], feature(1)["neck"])
    assert_refused(path, "HDF5's chunks of neck do not lie where the rows are")


def soft_link(file: Any) -> None:
    file["neck"] = h5py.SoftLink("/block:31")


def external_link(file: Any) -> None:
    file["neck"] = h5py.ExternalLink("other.h5", "/neck")


def virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((COUNT, *TAPS["neck"].shape), "<f2")
    layout[:] = h5py.VirtualSource("other.h5", "neck", (COUNT, *TAPS["neck"].shape))
    file.create_virtual_dataset("neck", layout)


def external_file(file: Any) -> None:
    size = COUNT * TAPS["neck"].row_bytes
    file.create_dataset("neck", (COUNT, *TAPS["neck"].shape), "<f2", external=[("/etc/passwd", 0, size)])


def compressed(file: Any) -> None:
    shape = TAPS["neck"].shape
    file.create_dataset("neck", (COUNT, *shape), "<f2", chunks=(1, *shape), compression="gzip", fletcher32=True)


def other_fill(file: Any) -> None:
    shape = TAPS["neck"].shape
    file.create_dataset("neck", (COUNT, *shape), "<f2", chunks=(1, *shape), fillvalue=7, fletcher32=True)


def the_same_bytes(file: Any) -> None:
    file["neck"] = file["block:31"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (soft_link, "/neck is a link"),
        (external_link, "/neck is a link"),
        (virtual, "takes bytes from elsewhere"),
        (external_file, "takes bytes from elsewhere"),
        (compressed, "neck is not chunked by row with fletcher32 alone"),
        (other_fill, "has a fill value"),
        (the_same_bytes, "HDF5's neck has the type float32"),
    ],
)
def test_arrays_that_lead_the_library_elsewhere(change: Callable[[Any], None], reason: str, path: Path) -> None:
    with h5py.File(path, "r+", userblock_size=None) as file:
        del file["neck"]
        change(file)
    sign(path)
    assert_refused(path, reason)


def test_more_than_a_store_has(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["more"] = np.arange(3)
        file["index/slot"].attrs["note"] = "x"
        file.attrs["feature_store"] = np.bytes_(b"{}")
    sign(path)
    found = "\n".join(map(str, cache.verify(path)))
    assert "HDF5's group '/' does not hold exactly the arrays of the store" in found
    assert "HDF5's index/slot has attributes that no store has" in found
    assert "the attributes at HDF5's root are not the description" in found


def test_a_structure_that_the_library_cannot_read(path: Path) -> None:
    with h5py.File(path) as file:
        base = file.userblock_size
    content = bytearray(path.read_bytes())
    content[base : base + 8] = b"\0" * 8
    path.write_bytes(content)
    sign(path)
    assert_refused(path, "HDF5's library cannot read it (OSError")
