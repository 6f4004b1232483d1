"""How much memory there is to fill."""

from __future__ import annotations

from pathlib import Path


def free_host_bytes() -> int:
    """Say how much memory this process may take: what the machine has free, or a container's limit if that is less."""
    free = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")]
    limits = [*_lines("/sys/fs/cgroup/memory.max"), *_lines("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    return min([*free, *(int(limit) for limit in limits if limit.isdigit())], default=4 * 2**30)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().split("\n")
    except OSError:
        return []
