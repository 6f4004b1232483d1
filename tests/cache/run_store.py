"""A process that makes a store slowly, to be killed: `python -m tests.cache.run_store PATH COUNT SECONDS_A_ROW`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.cache.making import begin, rows, write


def main(path: Path, count: int, seconds: float) -> None:
    wanted = rows(range(count))
    with begin(path, wanted) as writer:
        print("reused", writer.reused, flush=True)
        for plan in writer.pending:
            for _ in plan.rows:
                time.sleep(seconds)
                print("encoded", flush=True)
            write(writer, plan, wanted)
        writer.commit()
    print("done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
