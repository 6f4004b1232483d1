"""Workers on a cluster, and a map over them."""

from __future__ import annotations

import math
import re
import reprlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.cluster.connection import Cluster, Need
from pipeline.cluster.seat import DISTRIBUTION, Seat, fitting, version_here
from pipeline.cluster.tasks import Done, Lost, Queue, Task
from pipeline.errors import ClusterError

T = TypeVar("T")
R = TypeVar("R")

_LOOK_SECONDS = 2.0  # between two looks at which nodes there are
_STILLBORN = 3  # workers that may die one after another before they begin
_GONE = 5  # times that the result of an item may be lost
_LONGEST_REASON = 300


@dataclass
class Share:
    """What a node has done for a pool.

    Attributes:
        node: Its name.
        workers: Workers that began there, the dead ones among them.
        items: Items that they finished.
        busy_seconds: Time that they worked, added up.
        waiting_seconds: Time that they waited for work or for their results to be taken, added up.
        died: Workers that died there.
    """

    node: str
    workers: int = 0
    items: int = 0
    busy_seconds: float = 0.0
    waiting_seconds: float = 0.0
    died: int = 0


@contextmanager
def hired(
    cluster: Cluster,
    make: Callable[[], Callable[[T], R]],
    *,
    need: Need | None = None,
    name: str,
    tell: Callable[[str], None] = lambda said: None,
) -> Iterator[Pool[T, R]]:
    """Workers for as long as the block lasts.

    Args:
        cluster: Where.
        make: Called once in each worker's process, on its node; gives what items are handed to. It travels there by
            pickle, once to each node, large arrays without a copy.
        need: What each takes of a node.
        name: What Ray's dashboard calls the workers and, with the item, their tasks.
        tell: Told when no node has room for a single worker.
    """
    pool: Pool[T, R] = Pool(cluster, make, cluster.settled(need or Need()), name, tell)
    cluster.ending.callback(pool.close)  # a pool that is closed again later finds nobody, and asks Ray for nothing
    try:
        yield pool
    finally:
        pool.close()


class Pool(Generic[T, R]):
    """Workers on a cluster; made by `hired`."""

    def __init__(
        self,
        cluster: Cluster,
        make: Callable[[], Callable[[T], R]],
        need: Need,
        name: str,
        tell: Callable[[str], None],
    ) -> None:
        """Hire nobody yet."""
        self._cluster, self._need, self._name, self._tell = cluster, need, name, tell
        self._ray = cluster.ray
        self._make = self._ray.put(make)
        self._workers: list[_Worker[T]] = []
        self._shares: dict[str, Share] = {}
        self._hired = self._stillborn = self._turn = 0
        self._looked, self._room = -math.inf, 0
        self._told = False

    @property
    def need(self) -> Need:
        """What each worker takes of a node."""
        return self._need

    @property
    def size(self) -> int:
        """Workers that have begun and live."""
        return sum(worker.begun is None and worker.died_of is None for worker in self._workers)

    @property
    def shares(self) -> Sequence[Share]:
        """What each node has done so far, by name."""
        for worker in self._workers:
            self._settle(worker)
        return [self._shares[node] for node in sorted(self._shares)]

    def map(
        self,
        items: Iterable[T],
        *,
        in_flight: int = 2,
        tries: int = 2,
        split: Callable[[T], Sequence[T]] | None = None,
        named: Callable[[T], str] = reprlib.repr,
    ) -> Iterator[Done[T, R] | Lost[T]]:
        """Have every item worked on and yield what comes of it, as it comes.

        Args:
            items: Drawn as there is room for them, never far ahead.
            in_flight: Items that a worker has at most: one at work, the others waiting there, or finished and not yet
                taken from here. So the results that wait are bounded, too.
            tries: Workers that an item may take with it.
            split: Takes an item apart that has used up its tries; its parts are then yielded in its place. None, and
                less than two parts, give the item up.
            named: What an item is called on the dashboard and in errors.

        Raises:
            Exception: Whatever a worker raised, with the node and the item named in a note.
            ClusterError: Workers die before they begin.
        """
        queue = Queue(items, tries, split)
        try:
            while True:
                queue.draw(1 + in_flight * max(self._wanted(), len(self._workers)))
                handed = sum(len(worker.tasks) for worker in self._workers)
                if not queue.waiting and not handed:
                    return
                self._hire(len(queue.waiting) + handed)
                self._hand_out(queue, in_flight, named)
                awaited = [reference for worker in self._workers for reference in worker.references]
                ready, _ = self._ray.wait(awaited, timeout=_LOOK_SECONDS)
                for reference in ready:
                    worker = next(worker for worker in self._workers if reference in worker.references)
                    if reference == worker.begun:
                        self._welcome(worker)
                        continue
                    if reference == worker.verdict:
                        self._hear(worker)
                        continue
                    outcome = self._take(worker, reference, queue, named)
                    if outcome is not None:
                        yield outcome
                        del outcome  # its result may be large
                del ready, awaited
                for worker in [worker for worker in self._workers if worker.is_to_bury()]:
                    lost = self._bury(worker, queue)
                    if lost is not None:
                        yield lost
        finally:
            for worker in [worker for worker in self._workers if worker.tasks]:  # nobody waits for these any more
                self._dismiss(worker)

    def close(self) -> None:
        """Dismiss all workers."""
        for worker in list(self._workers):
            self._dismiss(worker)

    def _wanted(self) -> int:
        """Workers that there should be, if there is work for so many."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            asked = {"GPU": self._need.gpus or 0.0, "CPU": self._need.cpus or 0.0}
            self._room = sum(fitting(asked, node["Resources"]) for node in self._cluster.nodes())
            if not self._room:
                self._complain()
        wanted = max(self._room, self._need.min, 1)
        return wanted if self._need.max is None else min(wanted, self._need.max)

    def _complain(self) -> None:
        """Say that there is room for nobody; on a cluster that cannot grow that is the end."""
        asked = f"a worker takes {self._need.gpus:g} GPUs and {self._need.cpus:g} processors (resources.ray)"
        if self._cluster.local:
            have = self._cluster.nodes()[0]["Resources"]
            message = (
                f"{asked}, and this machine has {have.get('GPU', 0):g} and {have.get('CPU', 0):g}: ask for less, or "
                f"name the address of a larger cluster"
            )
            raise ClusterError(message)
        if not self._told:
            self._tell(f"{asked}, and no node has so many: waiting for one")
            self._told = True

    def _hire(self, tasks: int) -> None:
        """Ask Ray for workers, no more than there are tasks; it places each as soon as a node has room."""
        while sum(worker.died_of is None for worker in self._workers) < min(self._wanted(), tasks):
            self._hired += 1
            seat = (
                self._ray.remote(Seat)
                .options(
                    name=f"{self._name} {self._hired}",
                    num_gpus=self._need.gpus,
                    num_cpus=self._need.cpus,
                    max_restarts=0,
                    max_task_retries=0,
                    scheduling_strategy="SPREAD",
                )
                .remote()
            )
            arrived = seat.arrive.options(name=f"{self._name}: arrive").remote()
            begun = seat.begin.options(name=f"{self._name}: begin").remote(self._make, str(Path.cwd()))
            self._workers.append(_Worker(seat, arrived, begun))

    def _welcome(self, worker: _Worker[T]) -> None:
        """Learn how the making of a worker ended."""
        node = "of a worker"
        try:
            node_id, version = self._ray.get(worker.arrived)
            node = self._cluster.node_name(node_id)
            if version != version_here():
                raise ClusterError(_other_version(node, version))
            self._ray.get(worker.begun)
        except self._ray.exceptions.RayTaskError as error:
            raise _of_worker(error, f"node {node}: {self._name} could not begin there") from error
        except self._ray.exceptions.RayError as error:
            if getattr(error, "actor_init_failed", False):
                raise ClusterError(_not_installed(error)) from error
            self._dismiss(worker)
            self._stillborn += "node has died" not in str(error)
            if self._stillborn >= _STILLBORN:
                message = f"{self._name}: {_STILLBORN} workers died before they began: {_how(error)}"
                raise ClusterError(message) from error
            return
        self._stillborn = 0
        worker.begun, worker.node_id, worker.since = None, node_id, time.monotonic()
        worker.share = self._shares.setdefault(node, Share(node))
        worker.share.workers += 1

    def _hand_out(self, queue: Queue[T], in_flight: int, named: Callable[[T], str]) -> None:
        """Give tasks to those who have least to do; who has one gets another only while there are enough for all."""
        while queue.waiting:
            able = [worker for worker in self._workers if worker.can_take()]
            worker = min(able, key=lambda worker: len(worker.tasks), default=None)
            has = 0 if worker is None else len(worker.tasks)
            if worker is None or has >= in_flight or (has and len(queue.waiting) < len(self._workers)):
                return
            task = queue.take(alone=not has)
            if task is None:
                return
            self._turn += 1
            task.turn = self._turn
            name = f"{self._name}: {named(task.item)}"
            reference = worker.seat.work.options(name=name).remote(task.item)
            task.arriving = reference.future()  # fetched whatever happens here, so that it outlives its node
            worker.tasks[reference] = task

    def _take(
        self, worker: _Worker[T], reference: Any, queue: Queue[T], named: Callable[[T], str]
    ) -> Done[T, R] | None:
        """Take what came of a task; None where there is nothing: its worker is dead, or it has to be done again."""
        assert worker.share is not None
        task, exceptions = worker.tasks.pop(reference), self._ray.exceptions
        arriving, task.arriving = task.arriving, None
        assert arriving is not None
        try:
            result, seconds = arriving.result()
        except exceptions.RayTaskError as error:
            raise _of_worker(error, f"node {worker.share.node}, {named(task.item)}") from error
        except exceptions.RayActorError as error:
            worker.died_of = worker.died_of or error
            worker.unfinished.append(task)
        except exceptions.RayError as error:  # its result is gone, as a rule with an object store: nobody is to blame
            task.gone += 1
            if task.gone > _GONE:
                message = f"the result of {named(task.item)} was lost {_GONE + 1} times: {_how(error)}"
                raise ClusterError(message) from error
            queue.put_back([task])
        else:
            worker.busy_seconds += seconds
            worker.share.items += 1
            worker.share.busy_seconds += seconds
            return Done(task.item, result, worker.share.node, seconds)
        return None

    def _bury(self, worker: _Worker[T], queue: Queue[T]) -> Lost[T] | None:
        """Have others do what a dead worker was to do; it took its tasks in order, so it died of the first."""
        assert worker.share is not None
        assert worker.died_of is not None
        worker.share.died += 1
        worker.unfinished.sort(key=lambda task: task.turn)
        first, *others = worker.unfinished
        if isinstance(worker.died_of, self._ray.exceptions.ActorUnavailableError):
            worker.verdict = worker.seat.answer.remote()
        else:
            self._dismiss(worker)
        if worker.verdict is not None or self._is_of_node(worker, worker.died_of):
            queue.put_back(worker.unfinished)
            return None
        queue.put_back(others)
        return queue.blame(first, _how(worker.died_of))

    def _hear(self, worker: _Worker[T]) -> None:
        """Learn what became of a worker that could not be reached: Ray knows some seconds later."""
        try:
            self._ray.get(worker.verdict)
        except self._ray.exceptions.ActorUnavailableError:
            worker.verdict = worker.seat.answer.remote()
            return
        except self._ray.exceptions.RayError as error:
            if not self._is_of_node(worker, error):
                worker.unfinished[0].deaths += 1
                worker.unfinished[0].suspect = True
        self._dismiss(worker)

    def _is_of_node(self, worker: _Worker[T], error: Exception) -> bool:
        """Whether a worker died with its node: then no task is to blame."""
        alive = any(node["NodeID"] == worker.node_id for node in self._cluster.nodes())
        return not alive or getattr(error, "preempted", False) or "node has died" in str(error)

    def _dismiss(self, worker: _Worker[T]) -> None:
        """Let a worker go, dead or alive."""
        self._settle(worker)
        self._workers.remove(worker)
        with suppress(Exception):  # it is dead, or the cluster is gone
            self._ray.kill(worker.seat, no_restart=True)

    def _settle(self, worker: _Worker[T]) -> None:
        """Add to its node's account what a worker has waited since the last time."""
        if worker.share is not None:
            now = time.monotonic()
            worker.share.waiting_seconds += max(0.0, now - worker.since - worker.busy_seconds)
            worker.since, worker.busy_seconds = now, 0.0


@dataclass(eq=False)
class _Worker(Generic[T]):
    """What the driver knows of a seat."""

    seat: Any
    arrived: Any  # reference to where it is
    begun: Any  # reference to the end of `begin`; None once that is known
    verdict: Any = None  # reference to a word of a seat that cannot be reached, which tells whether it is dead
    share: Share | None = None
    node_id: str = ""
    since: float = 0.0
    busy_seconds: float = 0.0
    tasks: dict[Any, Task[T]] = field(default_factory=dict)  # by the reference to their results, in order
    unfinished: list[Task[T]] = field(default_factory=list)  # those that it died with
    died_of: Exception | None = None

    @property
    def references(self) -> list[Any]:
        """What is awaited of it."""
        return [*self.tasks, *(one for one in (self.begun, self.verdict) if one is not None)]

    def is_to_bury(self) -> bool:
        """Whether it is dead, and nothing more comes of its tasks."""
        return self.died_of is not None and self.verdict is None and not self.tasks

    def can_take(self) -> bool:
        """Whether it may be handed a task beside those that it has."""
        return self.begun is None and self.died_of is None and not any(t.suspect for t in self.tasks.values())


def _of_worker(error: Any, where: str) -> BaseException:
    """The exception that a worker raised, with a note of where that was."""
    cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else ClusterError(str(error))
    cause.add_note(where)
    return cause


def _other_version(node: str, version: str) -> str:
    """A message for a node where another version of this package may make other bytes."""
    return (
        f"node {node} has {DISTRIBUTION} {version or '(none installed)'} and this machine has {version_here()}: "
        f"install the same version on every node"
    )


def _not_installed(error: Exception) -> str:
    """A message for a node that cannot load this package."""
    address = re.search(r"\bip=([^,)]+)", str(error))
    return (
        f"a node ({address[1] if address else 'of unknown address'}) cannot load {DISTRIBUTION}: "
        f"{str(error).splitlines()[-1].strip()}. Install {DISTRIBUTION} {version_here()} there, as on this machine"
    )


def _how(error: Exception) -> str:
    """How a worker died, in one line."""
    said = " ".join(str(error).split())
    _, told, detail = said.partition("Worker exit detail: ")
    said = (detail if told else said).partition(" Some common causes")[0].strip(" .")
    return said if len(said) <= _LONGEST_REASON else f"{said[: _LONGEST_REASON - 3]}..."
