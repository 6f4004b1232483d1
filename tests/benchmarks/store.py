"""How fast the store is beside its peers, on the same data: `python -m tests.benchmarks.store`.

From memory, from a disk whose pages were dropped, and over a network with a delay; `--only` takes a part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import cache
from pipeline.process import keep_freed_memory
from tests.benchmarks import store_far
from tests.benchmarks.store_readers import (
    BATCH,
    LARGE,
    SMALL,
    Reader,
    by_row,
    features,
    make_store,
    ours,
    readers,
    rows,
)

ROUNDS = 9


def seconds(
    read: Reader,
    batches: list[np.ndarray[Any, Any]],
    buffer: np.ndarray[Any, Any],
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Time of reading every batch into the buffer, that of the wall by default."""
    start = clock()
    for batch in batches:
        read(batch, buffer)
    return clock() - start


def reading(
    folder: Path, tap: cache.TapSpec, mib: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """GiB/s of shuffled batches of 32 from a warm page cache, by reader; all count the bytes that float16 has of a row.

    The quick readers take turns, so that a disturbance of the machine meets all of them; the best round counts.
    """
    count = max(2 * BATCH, mib * 2**20 // tap.row_bytes)
    data = features(count, tap)
    found = list(readers(folder, data, tap))
    buffer = np.zeros((BATCH, *tap.shape), np.float16)
    random = np.random.default_rng(1)
    spent: dict[str, list[float]] = {name: [] for name, _, _ in found}
    for turn in range(ROUNDS + 1):
        order = random.permutation(count)[: count // BATCH * BATCH]
        batches = np.split(order, len(order) // BATCH)
        for name, read, quick in found:
            chosen = batches if quick else batches[:2]
            if quick or turn < 3:
                spent[name].append(seconds(read, chosen, buffer, clock) / len(chosen))
    size = BATCH * tap.row_bytes / 2**30
    return {name: size / min(times[1:]) for name, times in spent.items()}


def threads(folder: Path, mib: int) -> float:
    """How much faster two threads read rows of 128 KiB, verified, than one."""
    count = max(2 * BATCH, mib * 2**20 // SMALL.row_bytes)
    store = make_store(folder / "store.zarr", features(count, SMALL), SMALL)
    buffers = [np.zeros((BATCH, *SMALL.shape), np.float16) for _ in range(2)]
    batches = np.split(np.random.default_rng(2).permutation(count)[: count // BATCH * BATCH], count // BATCH)

    def read(part: int, parts: int) -> None:
        for batch in batches[part::parts]:
            store.read(batch, out={"neck": buffers[part]})

    spent: dict[int, list[float]] = {1: [], 2: []}
    with ThreadPoolExecutor(2) as pool:
        for _ in range(ROUNDS):
            for parts, times in spent.items():
                start = time.perf_counter()
                list(pool.map(lambda part, parts=parts: read(part, parts), range(parts)))
                times.append(time.perf_counter() - start)
    return min(spent[1]) / min(spent[2])


def write_cost(folder: Path) -> float:
    """Time of writing a shard of 64 MiB, as a multiple of a plain write and fsync of the same bytes."""
    data = features(32, LARGE)
    ratios = []
    for turn in range(5):
        plain = folder / f"plain-{turn}"
        start = time.perf_counter()
        with plain.open("wb", buffering=0) as file:
            file.write(data.data)
            os.fsync(file.fileno())
        bare = time.perf_counter() - start
        path = folder / f"written-{turn}.zarr"
        with cache.create_store(
            path, fingerprint=cache.Fingerprint({}), taps={"neck": LARGE}, rows=rows(len(data))
        ) as writer:
            start = time.perf_counter()
            writer.write(writer.pending[0], {"neck": data}, np.ones((len(data), 2), np.float32))
            ratios.append((time.perf_counter() - start) / bare)
    return statistics.median(ratios)


OPEN = """
import sys, time
from pathlib import Path
import numpy as np
import cache
start = time.perf_counter()
store = cache.open_store(sys.argv[1])
store.ids
store.read([0])
spent = time.perf_counter() - start
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(spent, int(peak.split()[1]) / 1024)
"""

TINY = cache.TapSpec(8, 2, 2, "float16")
"""A row of 64 bytes: so little that nothing but the way to it costs."""
COUNTS = (1000, 1_000_000)


def opening(path: Path) -> tuple[float, float]:
    """Seconds to open a store and read a row, and the peak MiB of a process that does nothing else."""
    command = [sys.executable, "-c", OPEN, str(path)]
    spent, memory = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(spent), float(memory)


def batches(folder: Path) -> dict[tuple[str, int], float]:
    """Microseconds of a verified batch by reader and number of rows, in the stores that `tiny_stores` made.

    All take turns, with other rows every time, so that a disturbance of the machine meets all; the best round counts.
    A thousand such rows lie in the processor's cache and a million do not, which np.memmap pays for as well.
    """
    found: dict[tuple[str, int], Reader] = {}
    for count in COUNTS:
        mapped = np.memmap(folder / f"{count}.raw", np.float16, "r", shape=(count, *TINY.shape))
        found["memmap", count] = by_row(mapped)
        for suffix in ("zarr", "h5"):
            found[suffix, count] = ours(cache.open_store(folder / f"{count}.{suffix}"), verify=True)
    buffer = np.empty((BATCH, *TINY.shape), np.float16)
    random = np.random.default_rng(0)
    spent: dict[tuple[str, int], list[float]] = {key: [] for key in found}
    for _ in range(5 * ROUNDS):
        for (name, count), read in found.items():
            chosen = list(random.integers(0, count, (200, BATCH)))
            spent[name, count].append(seconds(read, chosen, buffer) / len(chosen))
    return {key: 1e6 * min(times) for key, times in spent.items()}


def tiny_stores(folder: Path) -> None:
    """`COUNT.raw`, `COUNT.zarr` and `COUNT.h5` of 64-byte rows."""
    for count in COUNTS:
        data = features(count, TINY)
        data.tofile(folder / f"{count}.raw")
        for suffix in ("zarr", "h5"):
            make_store(folder / f"{count}.{suffix}", data, TINY)


Tables = Mapping[str, Mapping[str, float]]
"""GiB/s by size of the rows and reader."""
Figures = dict[str, Any]


def measure_memory(folder: Path, mib: int) -> tuple[Figures, Tables]:
    """The figures of reading from memory, of writing and of opening, and the tables that some come from."""
    tables = {}
    for name, tap in (("2 MiB", LARGE), ("128 KiB", SMALL)):
        with tempfile.TemporaryDirectory(dir=folder) as inner:
            tables[name] = reading(Path(inner), tap, mib)
    large, small = ({name: speed / t["np.memmap, row by row"] for name, speed in t.items()} for t in tables.values())
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        cost = write_cost(Path(inner))
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        scaling = threads(Path(inner), mib // 2)
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        tiny_stores(Path(inner))
        million = {suffix: opening(Path(inner) / f"{COUNTS[1]}.{suffix}") for suffix in ("zarr", "h5")}
        batch = batches(Path(inner))
    return {
        "read_2mib": large["store, zarr"],
        "read_2mib_verified": large["store, zarr, verified"],
        "read_128kib": small["store, zarr"],
        "read_128kib_verified": small["store, zarr, verified"],
        "hdf5_read_2mib": large["store, hdf5"],
        "hdf5_read_2mib_verified": large["store, hdf5, verified"],
        "hdf5_read_128kib": small["store, hdf5"],
        "hdf5_read_128kib_verified": small["store, hdf5, verified"],
        **{
            f"int8_to_{dtype}_{size}_of_float16": table[f"store, int8, verified, {kind}"]
            / table["store, zarr, verified"]
            for size, table in (("2mib", large), ("128kib", small))
            for dtype, kind in (("float16", "to float16"), ("float32", "to float32"), ("stored", "as stored"))
        },
        **{
            f"{name}_{size}_of_float16": table[reader] / table["store, zarr, verified"]
            for size, table in (("2mib", large), ("128kib", small))
            for name, reader in (
                ("int8_by_torch", "store, int8, verified, to float16 by torch"),
                ("float16_by_torch", "store, float16, verified, by torch"),
                ("bfloat16_to_float32", "store, bfloat16, verified, to float32"),
                ("memcpy_float16", "memcpy of the same rows in float16"),
                ("memcpy_float32", "memcpy of the same rows in float32"),
            )
        },
        "over_zarr_oindex": large["store, zarr, verified"] / large["zarr, oindex"],
        "threads_2_over_1": scaling,
        "write_cost": cost,
        "open_1m_seconds": million["zarr"][0],
        "open_1m_mb": million["zarr"][1],
        "open_1m_hdf5_seconds": million["h5"][0],
        "open_1m_hdf5_mb": million["h5"][1],
        **{f"batch_{name}_1m_us": batch[name, COUNTS[1]] for name in ("zarr", "h5", "memmap")},
        **{
            f"batch_{name}_1m_over_1k": batch[name, COUNTS[1]] / batch[name, COUNTS[0]]
            for name in ("zarr", "h5", "memmap")
        },
    }, tables


def measure_busy(folder: Path | None, mib: int) -> Tables:
    """The tables alone, by the processor's time."""
    tables = {}
    for name, tap in (("2 MiB", LARGE), ("128 KiB", SMALL)):
        with tempfile.TemporaryDirectory(dir=folder) as inner:
            tables[name] = reading(Path(inner), tap, mib, time.process_time)
    return tables


def measure_cold(folder: Path, mib: int) -> tuple[Figures, Tables]:
    """Shuffled epochs over stores whose pages were dropped, as float16 and as int8; see `store_far.cold`."""
    stores = {}
    for size, tap in (("2mib", LARGE), ("128kib", SMALL)):
        data = features(mib * 2**20 // tap.row_bytes // BATCH * BATCH, tap)
        for dtype in ("float16", "int8"):
            stores[f"{size}_{dtype}"] = folder / f"{size}-{dtype}.zarr"
            make_store(stores[f"{size}_{dtype}"], data, tap, dtype).close()
    return store_far.cold(stores, BATCH), {}


def measure_far(folder: Path, mib: int) -> tuple[Figures, Tables]:
    """First epochs over a network with a delay, beside others' on the same rows; see `store_far.far`."""
    sizes = {
        name: (mib * 2**20 // tap.row_bytes // BATCH * BATCH, tap.shape)
        for name, tap in (("2mib", LARGE), ("128kib", SMALL))
    }
    pythons = store_far.interpreters(folder)
    return store_far.far(folder, sizes, pythons, lambda line: print(line, file=sys.stderr, flush=True)), {}


PARTS = {"memory": measure_memory, "cold": measure_cold, "far": measure_far}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    parser.add_argument("--mib", type=int, default=512, help="size of the data set, MiB")
    parser.add_argument(
        "--folder", type=Path, help="where to write, a temporary folder by default; `cold` reads its disk"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=tuple(PARTS),
        help="a part, may be repeated: from memory, a cold disk, or afar beside litdata and mosaicml-streaming",
    )
    parser.add_argument("--busy", action="store_true", help="only the readers from memory, by the processor's time")
    arguments = parser.parse_args()
    keep_freed_memory()  # as commands do
    if arguments.busy:
        tables = measure_busy(arguments.folder, arguments.mib)
        print(json.dumps(tables)) if arguments.json else print_tables(tables, arguments.mib)
        return
    figures: dict[str, Any] = {}
    for part in arguments.only or PARTS:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            found, tables = PARTS[part](Path(folder), arguments.mib)
        figures |= {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}
        if tables and not arguments.json:
            print_tables(tables, arguments.mib)
    if arguments.json:
        print(json.dumps(figures))
        return
    print("\n| figure | value |\n| --- | --- |")
    for name, value in figures.items():
        print(f"| `{name}` | {value} |")


def print_tables(tables: Tables, mib: int) -> None:
    """Print what `reading` has found of both sizes of rows."""
    print(f"shuffled batches of {BATCH}, warm page cache, {mib} MiB, {os.cpu_count()} cores\n")
    print(
        "| reader | 2 MiB rows, GiB/s | of memmap | 128 KiB rows, GiB/s | of memmap |\n| --- | --- | --- | --- | --- |"
    )
    bases = [table["np.memmap, row by row"] for table in tables.values()]
    for name in tables["2 MiB"]:
        cells = (
            f"{table[name]:.2f} | {table[name] / base:.2f}" for table, base in zip(tables.values(), bases, strict=True)
        )
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
