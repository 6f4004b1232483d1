"""`python -m pipeline` is the same as `pipeline`."""

from __future__ import annotations

import gc
import os

# Threads that wait for work sleep instead of spinning: on a shared machine spinning takes the cores from whoever works.
# OpenMP reads this when torch is loaded, so it is set before anything else is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pipeline.cli import main
from pipeline.cli.memory import keep_freed_memory

keep_freed_memory()
# torch makes a million objects when it is imported; to look for garbage after every 700 takes a sixth of the start.
gc.set_threshold(10_000)

__all__ = ["main"]

if __name__ == "__main__":
    main()
