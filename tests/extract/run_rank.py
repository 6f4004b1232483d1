"""One of several processes that make a store: `python -m tests.extract.run_rank STORE RANK WORLD SECONDS COUNT`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pipeline.extract.extract import Ranks, extract

from .fakes import CountingEncoder, as_encoder
from .pictures import Pictures, picture

COUNT = 64


class Slow(CountingEncoder):
    """Takes its time over each batch, so that others can be killed meanwhile."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def encode(self, *batch):  # type: ignore[no-untyped-def]
        time.sleep(self.seconds)
        return super().encode(*batch)


class Large(Pictures):
    """Take their time to decode, so that others come while the first process looks at them."""

    def read(self, index):  # type: ignore[no-untyped-def]
        time.sleep(0.03)
        return super().read(index)


def main() -> None:
    path, rank, world, seconds, count = sys.argv[1:]
    source = Large({f"{i:03d}.png": picture(i) for i in range(int(count))})
    encoder = Slow(float(seconds))
    encoder.taps = {"neck": (256, 16, 16)}  # 8 rows of 128 KiB in a shard of 1 MiB
    report = extract(
        source.dataset(),
        as_encoder(encoder),
        Path(path),
        reading={},
        shard_mib=1,
        batch_size=2,
        ranks=Ranks(int(rank), int(world), wait_seconds=60),
    )
    print(report.encoded, sum(source.reads.values()))


if __name__ == "__main__":
    main()
