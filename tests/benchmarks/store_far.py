"""Reading a store that is not in memory: from a disk whose pages were dropped, and over a network with a delay.

Both stand beside something of the same run: plain sequential reading of the same files, and litdata and
mosaicml-streaming with their defaults on the same rows.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import cache
from cache.description import ERROR

BLOCK_BYTES = 4 << 20
COLD_ROUNDS = 7
FAR_ROUNDS = 3
DELAY_MS = 20


def drop(store: Path) -> None:
    """Make the system forget the pages of a store, which needs no root; maps of them must be closed."""
    for file in (file for file in store.rglob("*") if file.is_file()):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def sequential(store: Path) -> float:
    """Seconds to read the files of all features from their first byte to their last, 4 MiB at a time."""
    block, start = bytearray(BLOCK_BYTES), perf_counter()
    for path in sorted(store.glob("neck*/c.*")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return perf_counter() - start


def epoch(store: Path, seed: int, batch: int) -> float:
    """Seconds to read every row once in batches of another order, checked, as a feed does: int8 with its scales."""
    opened = cache.open_store(store)
    order = np.random.default_rng(seed).permutation(len(opened))
    buffer = {
        name: np.zeros((batch, *array.shape), array.array_dtype)
        for name, array in opened.arrays.items()
        if not name.endswith(ERROR)
    }
    start = perf_counter()
    for first in range(0, len(order) - batch + 1, batch):
        opened.read(order[first : first + batch], tuple(buffer), out=buffer)
    return perf_counter() - start


def _from_disk() -> int:
    """Bytes that this process has made the disk send."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def cold(stores: dict[str, Path], batch: int) -> dict[str, float]:
    """Time of plain sequential reading over that of a shuffled epoch, both from the disk, by store.

    A store larger than memory is read so in every epoch. One above 1 is read faster than its files from end to end.
    Both take turns in going first; the ratio is that of each round, its median and its extremes over rounds.
    """
    ratios: dict[str, list[float]] = {name: [] for name in stores}
    spent: dict[str, list[float]] = {name: [] for name in stores}
    shares: list[float] = []
    for turn in range(COLD_ROUNDS):
        for name, path in stores.items():
            found = {}
            for what in ("plain", "shuffled")[:: 1 if turn % 2 else -1]:
                drop(path)
                before = _from_disk()
                found[what] = sequential(path) if what == "plain" else epoch(path, turn, batch)
                shares.append((_from_disk() - before) / sum(file.stat().st_size for file in path.glob("neck*/c.*")))
            ratios[name].append(found["plain"] / found["shuffled"])
            spent[name].append(found["shuffled"])
    figures = {"cold_share_from_disk_least": min(shares)}
    for name, values in ratios.items():
        figures[f"cold_{name}_of_sequential"] = statistics.median(values)
        figures[f"cold_{name}_of_sequential_least"], figures[f"cold_{name}_of_sequential_most"] = (
            min(values),
            max(values),
        )
        figures[f"cold_{name}_rows_per_second"] = len(cache.open_store(stores[name])) / statistics.median(spent[name])
    return figures


@dataclass(frozen=True)
class Reader:
    """One way to read the rows.

    Attributes:
        name: What it is called in the result.
        system: As `far_epoch` knows it.
        scheme: Of the URL, http or s3.
    """

    name: str
    system: str
    scheme: str


READERS = (
    Reader("ours_http", "ours", "http"),
    Reader("ours_s3", "ours", "s3"),
    Reader("litdata_s3", "litdata", "s3"),
    Reader("mosaicml_s3", "mosaicml-streaming", "s3"),
)
UNABLE = {
    "litdata_http": "litdata has no reader for http",
    "mosaicml_http": "mosaicml-streaming has no reader for http",
}


Pythons = dict[tuple[str, str], Path | str]
Progress = Callable[[str], None]


class FarError(Exception):
    """A system could not be run."""


def interpreters(folder: Path) -> Pythons:
    """A Python for each system and scheme, or why there is none; uv makes those of the others, which do not fit ours.

    litdata and mosaicml-streaming ask for an older numpy and other packages than the project has.
    """
    here = Path(sys.executable)
    peers = _environment(folder / "peers", ("litdata", "mosaicml-streaming", "boto3"))
    ours = here if importlib.util.find_spec("s3fs") else _environment(folder / "ours", (".", "s3fs"))
    return {
        ("ours", "http"): here,
        ("ours", "s3"): ours,
        ("litdata", "s3"): peers,
        ("mosaicml-streaming", "s3"): peers,
    }


def _environment(folder: Path, packages: tuple[str, ...]) -> Path | str:
    """A Python with some packages, or why there is none."""
    if shutil.which("uv") is None:
        return f"{', '.join(packages)} need an environment of their own, and there is no uv to make it"
    python, version = folder / "bin" / "python", f"{sys.version_info.major}.{sys.version_info.minor}"
    for command in (
        ["venv", "--python", version, str(folder)],
        ["pip", "install", "--python", str(python), *packages],
    ):
        made = subprocess.run(["uv", *command, "-q"], capture_output=True, text=True)
        if made.returncode:
            return (made.stderr.strip().splitlines() or ["uv says nothing"])[-1]
    return python


class _System:
    """A process that writes and reads for one system."""

    def __init__(self, reader: Reader, python: Path | str, folder: Path, environment: dict[str, str]) -> None:
        self._started = None
        self._reason = python if isinstance(python, str) else ""
        self._said = folder / f"{reader.name}.stderr"
        if isinstance(python, Path):
            self._started = subprocess.Popen(
                [str(python), "-m", "tests.benchmarks.far_epoch", reader.system, reader.scheme],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said.open("w"),
                text=True,
                env={**os.environ, **environment},
            )

    def ask(self, *question: str | int) -> dict[str, float]:
        """What `far_epoch` answers.

        Raises:
            FarError: It could not be run.
        """
        if self._started is None:
            raise FarError(self._reason)
        assert self._started.stdin is not None
        assert self._started.stdout is not None
        try:
            print(json.dumps(question), file=self._started.stdin, flush=True)
        except BrokenPipeError:
            line = ""
        else:
            line = self._started.stdout.readline()
        answer = json.loads(line or "{}")
        if not line or "error" in answer:
            said = (self._said.read_text().strip().splitlines() or ["it says nothing"])[-1]
            raise FarError(answer.get("error", said))
        result: dict[str, float] = answer
        return result

    def close(self) -> None:
        """End the process."""
        if self._started is not None:
            self._started.kill()
            self._started.communicate()


@contextmanager
def served(folder: Path) -> Iterator[dict[str, str]]:
    """A server of the folder with a delay; gives what an S3 client reads from its environment."""
    command = [sys.executable, "-m", "tests.benchmarks.far_server", str(folder), "--delay-ms", str(DELAY_MS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
            yield {
                "AWS_ENDPOINT_URL": endpoint,
                "S3_ENDPOINT_URL": endpoint,  # mosaicml-streaming looks here
                "AWS_ACCESS_KEY_ID": "nobody",
                "AWS_SECRET_ACCESS_KEY": "nothing",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "DISABLE_S5CMD": "1",
                "FAR_CACHES": str(folder),
            }
        finally:
            server.terminate()


def far(
    folder: Path, sizes: Mapping[str, tuple[int, tuple[int, int, int]]], pythons: Pythons, progress: Progress
) -> dict[str, Any]:
    """Rows a second of a first epoch in another order, into an empty cache, and seconds until its first batch.

    Each system reads what it has written itself of the same rows, in a process of its own. They take turns; the median
    over rounds counts, and the spread is that of rows a second. A system that cannot be run says why.

    Args:
        folder: Where to write.
        sizes: Number and shape of rows by name.
        pythons: See `interpreters`.
        progress: Told of each reading.
    """
    failed = dict(UNABLE)
    found: dict[str, Any] = {}
    with served(folder) as environment, ExitStack() as stack:
        running = {r: _System(r, pythons[r.system, r.scheme], folder, environment) for r in READERS}
        for system in running.values():
            stack.callback(system.close)
        for size, (count, shape) in sizes.items():
            written: dict[str, dict[str, float]] = {}
            epochs: dict[str, list[dict[str, float]]] = {}
            for reader, system in running.items():
                with _noted(failed, reader.name):
                    if reader.system not in written:
                        written[reader.system] = system.ask("write", str(folder / size / reader.system), count, *shape)
            for _ in range(FAR_ROUNDS):
                for reader in (reader for reader in READERS if reader.name not in failed):
                    base = environment["AWS_ENDPOINT_URL"] if reader.scheme == "http" else "s3:/"
                    with _noted(failed, reader.name):
                        read = running[reader].ask("read", f"{base}/{size}/{reader.system}")
                        if any(read[key] != expected for key, expected in written[reader.system].items()):
                            message = f"it gave {read}, and not the rows of {written[reader.system]}"
                            raise FarError(message)
                        epochs.setdefault(reader.name, []).append(read)
                        progress(f"{size} {reader.name}: {read['seconds']:.2f} s, first {read['first']:.2f} s")
            found |= _summary(size, count, epochs)
            shutil.rmtree(folder / size)
    return found | {f"far_{name}_not_run": reason for name, reason in failed.items()}


def _summary(size: str, count: int, epochs: Mapping[str, list[dict[str, float]]]) -> dict[str, float]:
    """The figures of one size."""
    found: dict[str, float] = {}
    speeds: dict[str, float] = {}
    for name, read in epochs.items():
        what, seconds = f"far_{size}_{name}", [one["seconds"] for one in read]
        speeds[name] = count / statistics.median(seconds)
        found[f"{what}_rows_per_second"] = speeds[name]
        found[f"{what}_rows_per_second_least"] = count / max(seconds)
        found[f"{what}_rows_per_second_most"] = count / min(seconds)
        found[f"{what}_first_batch_seconds"] = statistics.median(one["first"] for one in read)
    peers = [speed for name, speed in speeds.items() if not name.startswith("ours")]
    for name in ("ours_http", "ours_s3"):
        if name in speeds and peers:
            found[f"far_{size}_{name}_over_best_peer"] = speeds[name] / max(peers)
    return found


@contextmanager
def _noted(failed: dict[str, str], name: str) -> Iterator[None]:
    """Note why a reader cannot be run, and go on."""
    try:
        yield
    except FarError as error:
        failed[name] = str(error)
