"""Stores of noise, and every way to read batches of their rows out of the page cache: ours, and what others have."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr

import cache

BATCH = 32
Reader = Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], object]

LARGE = cache.TapSpec(256, 64, 64, "float16")
"""A row of 2 MiB: the neck of SAM without a pool."""
SMALL = cache.TapSpec(256, 16, 16, "float16")
"""A row of 128 KiB: the neck of SAM pooled by 4."""


def features(count: int, tap: cache.TapSpec) -> np.ndarray[Any, Any]:
    """Noise of (count, C, h, w): every row differs, nothing compresses."""
    random = np.random.default_rng(0)
    return random.integers(0, 0x7BFF, (count, *tap.shape), np.uint16).view(np.float16)


def rows(count: int) -> list[cache.Row]:
    return [cache.Row(f"image-{i}", hashlib.sha256(b"%d" % i).digest()) for i in range(count)]


def make_store(
    path: Path, data: np.ndarray[Any, Any], tap: cache.TapSpec, dtype: str = "float16", shard_mib: float = 64
) -> cache.Store:
    """A store whose only tap, `neck`, holds `data`, as another type if asked for."""
    tap = dataclasses.replace(tap, dtype=dtype)
    fingerprint = cache.Fingerprint({"encoder": "noise"})
    with cache.create_store(
        path, fingerprint=fingerprint, taps={"neck": tap}, rows=rows(len(data)), shard_mib=shard_mib
    ) as writer:
        for plan in writer.pending:
            first, last = plan.rows[0], plan.rows[-1]
            writer.write(plan, {"neck": data[first : last + 1]}, np.ones((len(plan.rows), 2), np.float32))
        return writer.commit()


def by_row(source: Any) -> Reader:
    """Row by row out of anything that is indexed like an array."""

    def read(batch: np.ndarray[Any, Any], buffer: np.ndarray[Any, Any]) -> None:
        for i, row in enumerate(batch):
            buffer[i] = source[row]

    return read


def of_int8(store: cache.Store, dtype: str) -> Reader:
    """Batches out of an int8 store, verified: into the buffer as float16; as float32; or as they lie, with scales."""
    shapes = {name: (BATCH, *store.arrays[name].shape) for name in ("neck", "neck.scale")}
    wide = {"neck": np.zeros(shapes["neck"], "float32" if dtype == "float32" else "int8")}
    stored = {**wide, "neck.scale": np.zeros(shapes["neck.scale"], np.float32)}

    def read(batch: np.ndarray[Any, Any], buffer: np.ndarray[Any, Any]) -> object:
        if dtype == "stored":
            return store.read(batch, tuple(stored), out=stored)
        return store.read(batch, out={"neck": buffer} if dtype == "float16" else wide)

    return read


def of_bfloat16(store: cache.Store) -> Reader:
    """Batches out of a bfloat16 store, verified, as float32."""
    wide = {"neck": np.zeros((BATCH, *store.arrays["neck"].shape), np.float32)}
    return lambda batch, buffer: store.read(batch, out=wide)


def by_torch(store: cache.Store) -> Reader:
    """Batches as stage two and the probe take them from a store, verified: new tensors of float16."""
    from pipeline.train.feeding.packed import read_tensors

    return lambda batch, buffer: read_tensors(store, batch, ["neck"])


def memcpy(shape: tuple[int, ...], dtype: str) -> Reader:
    """No reading at all: the bytes of a batch, from memory to memory."""
    source, target = np.ones(shape, dtype), np.zeros(shape, dtype)
    return lambda batch, buffer: np.copyto(target, source)


def ours(store: cache.Store, verify: bool) -> Reader:
    """Batches out of a store."""
    return lambda batch, buffer: store.read(batch, out={"neck": buffer}, verify=verify)


def readers(folder: Path, data: np.ndarray[Any, Any], tap: cache.TapSpec) -> Iterator[tuple[str, Reader, bool]]:
    """Name, reader and whether it is quick enough for full rounds, of everything that runs here."""
    raw = folder / "rows.raw"
    data.tofile(raw)
    mapped = np.memmap(raw, np.float16, "r", shape=data.shape)

    def direct(batch: np.ndarray[Any, Any], buffer: np.ndarray[Any, Any]) -> None:
        for i, row in enumerate(batch):
            packed_rows.read_direct(buffer, np.s_[int(row)], np.s_[i])

    def files(batch: np.ndarray[Any, Any], buffer: np.ndarray[Any, Any]) -> None:
        for i, row in enumerate(batch):
            buffer[i] = np.load(folder / "npy" / f"{row}.npy")

    yield "np.memmap, row by row", by_row(mapped), True
    folded = make_store(folder / "store.zarr", data, tap)
    packed = make_store(folder / "store.h5", data, tap)
    yield "store, zarr", ours(folded, verify=False), True
    yield "store, zarr, verified", ours(folded, verify=True), True
    yield "store, hdf5", ours(packed, verify=False), True
    yield "store, hdf5, verified", ours(packed, verify=True), True
    whole = make_store(folder / "int8.zarr", data, tap, "int8")
    for dtype in ("float16", "float32", "stored"):
        yield (
            f"store, int8, verified, {'as stored' if dtype == 'stored' else f'to {dtype}'}",
            of_int8(whole, dtype),
            True,
        )
    yield "store, int8, verified, to float16 by torch", by_torch(whole), True
    yield "store, float16, verified, by torch", by_torch(folded), True
    yield (
        "store, bfloat16, verified, to float32",
        of_bfloat16(make_store(folder / "bfloat16.zarr", data.astype(np.float32), tap, "bfloat16")),
        True,
    )
    for dtype in ("float16", "float32"):
        yield f"memcpy of the same rows in {dtype}", memcpy((BATCH, *tap.shape), dtype), True
    packed_rows = h5py.File(folder / "store.h5", "r")["neck"]
    yield "h5py, read_direct by row", direct, True
    (folder / "npy").mkdir()
    for i, row in enumerate(data):
        np.save(folder / "npy" / f"{i}.npy", row)
    yield "one .npy a sample", files, True
    array: Any = zarr.open_group(folder / "store.zarr", mode="r")["neck"]
    yield "zarr, row by row", by_row(array), False
    yield "zarr, oindex", lambda batch, buffer: array.oindex[np.sort(batch)], False
    yield from litdata_reader(folder, data)
    yield from mosaic_reader(folder, data)


def litdata_reader(folder: Path, data: np.ndarray[Any, Any]) -> Iterator[tuple[str, Reader, bool]]:
    """litdata where it is installed."""
    if importlib.util.find_spec("litdata") is None:
        return
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder / "litdata"), chunk_bytes="64MB")
    for i, row in enumerate(data):
        writer[i] = {"neck": row}
    writer.done()
    writer.merge()
    peer = StreamingDataset(str(folder / "litdata"))

    def read(batch: np.ndarray[Any, Any], buffer: np.ndarray[Any, Any]) -> None:
        for i, row in enumerate(batch):
            buffer[i] = peer[int(row)]["neck"]

    yield "litdata", read, False


def mosaic_reader(folder: Path, data: np.ndarray[Any, Any]) -> Iterator[tuple[str, Reader, bool]]:
    """mosaicml-streaming where it is installed."""
    if importlib.util.find_spec("streaming") is None:
        return
    from streaming import LocalDataset, MDSWriter

    with MDSWriter(out=str(folder / "mds"), columns={"neck": "ndarray"}) as writer:
        for row in data:
            writer.write({"neck": row})
    peer = LocalDataset(str(folder / "mds"))

    def read(batch: np.ndarray[Any, Any], buffer: np.ndarray[Any, Any]) -> None:
        for i, row in enumerate(batch):
            buffer[i] = peer[int(row)]["neck"]

    yield "mosaicml-streaming", read, False
