"""One system writes features, or reads them once over a network in another order; each in a process of its own.

`python -m tests.benchmarks.far_epoch write SYSTEM FOLDER ROWS C H W` writes noise, and `read SYSTEM URL` reads it into
an empty cache; each prints a JSON object. Only what SYSTEM needs is imported, for the packages that are compared do not
fit into one environment with ours.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 32
Array = np.ndarray[Any, Any]


def features(count: int, shape: tuple[int, int, int]) -> Iterator[Array]:
    """Rows (C, h, w) of float16 noise; nothing compresses."""
    random = np.random.default_rng(0)
    for _ in range(count):
        yield random.integers(0, 0x7BFF, shape, np.uint16).view(np.float16)


def mark(batch: Array) -> int:
    """A number that tells whether every row was read once and none was changed; of first and last numbers only."""
    ends = np.ascontiguousarray(batch).reshape(len(batch), -1)[:, [0, -1]]
    return int(ends.view(np.uint16).astype(np.int64).sum())


def write_ours(folder: Path, rows: Iterator[Array], count: int, shape: tuple[int, int, int]) -> None:
    """A zarr store of ours, `store.zarr`."""
    import cache

    tap = cache.TapSpec(*shape, "float16")
    names = [cache.Row(f"image-{i}", hashlib.sha256(b"%d" % i).digest()) for i in range(count)]
    fingerprint = cache.Fingerprint({"encoder": "noise"})
    with cache.create_store(
        folder / "store.zarr", fingerprint=fingerprint, taps={"neck": tap}, rows=names, shard_mib=64
    ) as writer:
        for plan in writer.pending:
            data = np.stack([next(rows) for _ in plan.rows])
            writer.write(plan, {"neck": data}, np.ones((len(data), 2), np.float32))
        writer.commit()


def write_litdata(folder: Path, rows: Iterator[Array], count: int, shape: tuple[int, int, int]) -> None:
    """Chunks of litdata."""
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for i, row in enumerate(rows):
        writer[i] = {"neck": row}
    writer.done()
    writer.merge()


def write_mosaic(folder: Path, rows: Iterator[Array], count: int, shape: tuple[int, int, int]) -> None:
    """Shards of mosaicml-streaming."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"neck": "ndarray"}) as writer:
        for row in rows:
            writer.write({"neck": row})


def read_ours(url: str, local: Path) -> Iterator[Array]:
    """Batches of any order into one buffer, each row's checksum compared."""
    import cache

    store = cache.open_store(f"{url}/store.zarr")
    tap, order = store.taps["neck"], np.random.default_rng(1).permutation(len(store))
    buffer = np.empty((BATCH, *tap.shape), np.float16)
    for first in range(0, len(order), BATCH):
        rows = order[first : first + BATCH]
        yield store.read(rows, out={"neck": buffer[: len(rows)]})["neck"]


def read_litdata(url: str, local: Path) -> Iterator[Array]:
    """Batches of its loader, shuffled as it does that; it insists on https for a bucket unless it is told this."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    data = StreamingDataset(url, cache_dir=str(local), shuffle=True)
    for batch in StreamingDataLoader(data, batch_size=BATCH):
        yield batch["neck"].numpy()


def read_mosaic(url: str, local: Path) -> Iterator[Array]:
    """Batches of torch's loader, shuffled as its data set does that."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    data = StreamingDataset(remote=url, local=str(local), shuffle=True, batch_size=BATCH)
    for batch in DataLoader(data, batch_size=BATCH):
        yield batch["neck"].numpy()


WRITE: dict[str, Callable[..., None]] = {
    "ours": write_ours,
    "litdata": write_litdata,
    "mosaicml-streaming": write_mosaic,
}
READ: dict[str, Callable[..., Iterator[Array]]] = {
    "ours": read_ours,
    "litdata": read_litdata,
    "mosaicml-streaming": read_mosaic,
}


IMPORTS = {
    ("ours", "http"): ("cache.reading.remote", "fsspec.implementations.http"),
    ("ours", "s3"): ("cache.reading.remote", "s3fs"),
    ("litdata", "s3"): ("litdata", "boto3", "obstore"),
    ("mosaicml-streaming", "s3"): ("streaming", "boto3"),
}


def read(system: str, url: str) -> dict[str, float]:
    """Seconds to the first batch and to the last, from the moment the data set is opened, imports not counted."""
    for module in IMPORTS[system, url.partition(":")[0]]:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(dir=os.environ.get("FAR_CACHES")) as local:
        os.environ["FEATURE_STORE_CACHE"] = local
        start, first, rows, marks = time.perf_counter(), 0.0, 0, 0
        for batch in READ[system](url, Path(local)):
            first = first or time.perf_counter() - start
            rows, marks = rows + len(batch), marks + mark(batch)
        return {"seconds": time.perf_counter() - start, "first": first, "rows": rows, "mark": marks}


def main() -> None:
    """Do what the arguments say."""
    action, system, place, *numbers = sys.argv[1:]
    if action == "read":
        print(json.dumps(read(system, place)))
        return
    count, c, h, w = map(int, numbers)
    WRITE[system](Path(place), features(count, (c, h, w)), count, (c, h, w))
    print(json.dumps({"rows": count, "mark": sum(mark(row[None]) for row in features(count, (c, h, w)))}))


if __name__ == "__main__":
    main()
