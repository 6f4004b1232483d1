"""Run work ahead of its consumer, in order and bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool that is waited for when all went well, and not when the block ends in an error or a request to stop."""
    pool = ThreadPoolExecutor(count, name)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def ahead(work: Callable[[T], R], items: Iterable[T], pool: ThreadPoolExecutor, depth: int) -> Generator[R]:
    """Yield `work(item)` in the order of `items` while `pool` runs at most `depth` items ahead of the consumer.

    Args:
        work: Called in the pool's threads.
        items: Drawn lazily, so that an endless or huge iterable costs nothing.
        pool: Where the work runs.
        depth: Finished and running items that may wait for the consumer.
    """
    queue: deque[Future[R]] = deque()
    try:
        for item in items:
            queue.append(pool.submit(work, item))
            if len(queue) > depth:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        for future in queue:
            future.cancel()
