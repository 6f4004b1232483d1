"""One system writes features, or reads them once over a network in another order, in a process of its own.

`python -m tests.benchmarks.far_epoch SYSTEM http|s3` takes lines of JSON: `["write", FOLDER, ROWS, C, H, W]` writes
noise, and `["read", URL]` reads it into an empty cache; each is answered by an object. Only what SYSTEM needs is
imported, and once, for that takes longer than reading; the packages that are compared do not fit into one environment.
"""

from __future__ import annotations

import faulthandler
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
PATIENCE_SECONDS = 120
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
    with tempfile.TemporaryDirectory(dir=os.environ.get("FAR_CACHES")) as local:
        os.environ["FEATURE_STORE_CACHE"] = local
        start, first, rows, marks = time.perf_counter(), 0.0, 0, 0
        for batch in READ[system](url, Path(local)):
            first = first or time.perf_counter() - start
            rows, marks = rows + len(batch), marks + mark(batch)
        return {"seconds": time.perf_counter() - start, "first": first, "rows": rows, "mark": marks}


def write(system: str, folder: str, count: int, c: int, h: int, w: int) -> dict[str, float]:
    """What every reader must find of the rows that are written."""
    shape = (c, h, w)
    WRITE[system](Path(folder), features(count, shape), count, shape)
    return {"rows": count, "mark": sum(mark(row[None]) for row in features(count, shape))}


def main() -> None:
    """Do what standard input says."""
    system, scheme = sys.argv[1:]
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what else is printed is none
        for module in IMPORTS[system, scheme]:
            importlib.import_module(module)
        for line in sys.stdin:
            action, *arguments = json.loads(line)
            faulthandler.dump_traceback_later(PATIENCE_SECONDS, exit=True)
            try:
                answer = {"write": write, "read": read}[action](system, *arguments)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
