"""What HDF5's own library finds in a packed store, against what the header of the store says.

This package reads a packed store without the library. A stranger could sign a file whose HDF5 structure leads the
library elsewhere: to other bytes of the file, through a link, a virtual data set or an external file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cache.description import KEY, TapSpec
from cache.fingerprint import canonical
from cache.formats.hdf5_file import Header
from cache.formats.second_copy import SPARE
from cache.formats.zarr_layout import CHECKSUM_BYTES, notes


def library_differences(path: Path, header: Header, block: int) -> Iterator[str]:
    """Say in which ways the library would read something else than this package.

    Args:
        path: The file, whose structure has the digest that the header tells.
        header: Its header.
        block: Size of the user block.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            yield from _root_differences(file, header, block)
            for name, tap in header.description.taps.items():
                yield from _tap_differences(file, name, tap, header)
            for name, entry in header.description.index.items():
                yield from _index_differences(file, f"index/{name}", entry.dtype, entry.shape, header)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        yield f"HDF5's library cannot read it ({type(error).__name__}: {error})"


def _root_differences(file: Any, header: Header, block: int) -> Iterator[str]:
    """The user block, the attribute, and that there are hard links to the arrays of the store and to nothing else."""
    import h5py

    if file.userblock_size != block:
        yield f"HDF5's library begins at byte {file.userblock_size} instead of {block}"
    stored = file.attrs[KEY] if list(file.attrs) == [KEY] else b""
    if bytes(stored) != canonical(header.description.to_json()):
        yield "the attributes at HDF5's root are not the description"
    index = {*header.description.index, SPARE}
    inner = {name for name in index if "/" not in name}
    wanted = {
        "/": {*header.description.taps, "index"},
        "/index": {*inner, "crc32c"},
        "/index/crc32c": {name.partition("/")[2] for name in index - inner},
    }
    for group, names in wanted.items():
        found = file[group]
        if set(found) != names:
            yield f"HDF5's group {group!r} does not hold exactly the arrays of the store"
        for name in found:
            if type(found.get(name, getlink=True)) is not h5py.HardLink:
                yield f"{group.rstrip('/')}/{name} is a link, which may lead out of the file"


def _tap_differences(file: Any, name: str, tap: TapSpec, header: Header) -> Iterator[str]:
    """Rows in chunks of their own, behind `fletcher32` and no other filter, at the places that the header tells."""
    import h5py

    found, slots = file[name], header.description.slots
    yield from _array_differences(found, name, tap.array_dtype, (slots, *tap.shape), notes(name, tap))
    plan = found.id.get_create_plist()
    filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
    if found.chunks != (1, *tap.shape) or filters != [h5py.h5z.FILTER_FLETCHER32]:
        yield f"{name} is not chunked by row with fletcher32 alone"
        return
    stride, first = tap.row_bytes + CHECKSUM_BYTES, header.offsets[name]
    chunks: list[tuple[Any, ...]] = []
    found.id.chunk_iter(lambda c: chunks.append((*c.chunk_offset, c.byte_offset, c.size, c.filter_mask)))
    expected = [(slot, 0, 0, 0, first + slot * stride, stride, 0) for slot in range(slots)]
    if sorted(chunks) != expected:
        yield f"HDF5's chunks of {name} do not lie where the rows are: its library would read something else"


def _index_differences(file: Any, name: str, dtype: str, shape: tuple[int, ...], header: Header) -> Iterator[str]:
    """An array in one piece at the place that the header tells."""
    import h5py

    found = file[name]
    yield from _array_differences(found, name, dtype, shape)
    layout = found.id.get_create_plist().get_layout()
    if layout != h5py.h5d.CONTIGUOUS or found.id.get_offset() != header.offsets[name]:
        yield f"HDF5's {name} does not lie where the header says: its library would read something else"


def _array_differences(
    found: Any, name: str, dtype: str, shape: tuple[int, ...], attributes: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Type and shape, and that the bytes are the file's own."""
    if found.shape != shape or found.maxshape != shape or found.dtype != np.dtype(dtype).newbyteorder("<"):
        yield f"HDF5's {name} has the type {found.dtype} and the shape {found.shape}"
    held = {key: value if isinstance(value, bytes) else None for key, value in found.attrs.items()}
    if held != {key: value.encode() for key, value in (attributes or {}).items()}:
        yield f"HDF5's {name} has attributes that no store has"
    if found.is_virtual or found.external or found.fillvalue != 0:
        yield f"HDF5's {name} takes bytes from elsewhere, or has a fill value that no store has"
