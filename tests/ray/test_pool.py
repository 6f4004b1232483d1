"""The pool of workers on a Ray cluster: what happens to items when workers, nodes and drivers die."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import Done, Lost, Need, Pool, connected, hired
from pipeline.cluster.folder import own_folder
from pipeline.errors import ClusterError, ConfigError, DataError
from tests.cli.conftest import ROOT, environment

from .conftest import Nodes, what_is_left
from .jobs import Counting, Dying, Noting, Refusing, Squares

Numbers = tuple[int, ...]


@contextmanager
def pool_on(nodes: Nodes, make: Any, **options: Any) -> Iterator[Pool[Numbers, tuple[int, list[int]]]]:
    with connected(nodes.address) as cluster, hired(cluster, make, name="squares", **options) as pool:
        yield pool


def halves(numbers: Numbers) -> Sequence[Numbers]:
    middle = len(numbers) // 2
    return [numbers[:middle], numbers[middle:]] if middle else []


def single(count: int) -> list[Numbers]:
    return [(number,) for number in range(count)]


def squares(outcomes: Sequence[Any]) -> dict[Numbers, list[int]]:
    """Results by item, each of which came once."""
    done = {outcome.item: outcome.result[1] for outcome in outcomes if isinstance(outcome, Done)}
    assert len(done) == sum(isinstance(outcome, Done) for outcome in outcomes)
    return done


def test_every_item_comes_back_once_and_none_is_drawn_far_ahead(nodes: Nodes) -> None:
    drawn = 0

    def items() -> Iterator[Numbers]:
        nonlocal drawn
        for item in single(40):
            drawn += 1
            yield item

    with pool_on(nodes, partial(Squares, 0.15)) as pool:
        outcomes, most = [], 0
        for outcome in pool.map(items(), in_flight=2):
            outcomes.append(outcome)
            most = max(most, drawn - len(outcomes))
        shares = pool.shares
    assert squares(outcomes) == {(n,): [n**2] for n in range(40)}
    assert most <= 3 * 2 + 1 + 3 * 2 < 40
    assert len(shares) == 3
    assert sum(share.items for share in shares) == 40
    assert sum(share.busy_seconds for share in shares) >= 40 * 0.15


def test_a_worker_that_dies_costs_nothing_but_time(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "5").touch()
    with pool_on(nodes, partial(Squares, 0.0, tmp_path), need=Need(max=1)) as pool:
        outcomes = list(pool.map(single(10)))
        died = sum(share.died for share in pool.shares)
    assert squares(outcomes) == {(n,): [n**2] for n in range(10)}
    assert died == 1


def test_a_result_that_comes_after_the_death_of_its_worker_loses_no_item_before_it(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it happens where a node dies: of two items of a worker the second is done, and the first is not."""
    with pool_on(nodes, Squares, need=Need(max=1)) as pool:
        take, dead = Future.result, list[Any]()

        def once(arriving: Future[Any]) -> Any:
            if not dead:
                dead.append(arriving)
                raise pool._ray.exceptions.ActorDiedError
            return take(arriving)

        monkeypatch.setattr(Future, "result", once)
        outcomes = list(pool.map(single(2)))
        monkeypatch.undo()
        died = sum(share.died for share in pool.shares)
    assert squares(outcomes) == {(n,): [n**2] for n in range(2)}
    assert (len(dead), died) == (1, 1)


def test_an_item_that_kills_its_workers_is_found_among_its_company_and_given_up_alone(nodes: Nodes) -> None:
    items = [(0, 1, 2, 3), (4, 5, -6, 7)]
    with pool_on(nodes, Squares, need=Need(max=1)) as pool:
        outcomes = list(pool.map(items, split=halves))
        (again,) = pool.map([(9,)])  # the pool is as good as before
    (lost,) = [outcome for outcome in outcomes if isinstance(outcome, Lost)]
    assert lost.item == (-6,)
    assert lost.reason.startswith("its worker died twice: Worker")
    found = squares(outcomes)
    assert found[0, 1, 2, 3] == [0, 1, 4, 9]
    assert sorted(square for item, of in found.items() for square in of) == [0, 1, 4, 9, 16, 25, 49]
    assert isinstance(again, Done)


def test_killed_nodes_and_new_ones_change_no_result_and_blame_no_item(nodes: Nodes) -> None:
    outcomes: list[Any] = []
    killed = False
    with pool_on(nodes, partial(Squares, 0.1)) as pool:

        def items() -> Iterator[Numbers]:
            """Until a fourth node has begun to work."""
            give_up = time.monotonic() + 60
            while time.monotonic() < give_up and (len(pool.shares) < 4 or not all(s.items for s in pool.shares)):
                yield (len(outcomes), time.monotonic_ns())

        for outcome in pool.map(items(), tries=1):  # a single death that is blamed on an item would lose it
            outcomes.append(outcome)
            if not killed and len(pool.shares) == 3 and all(share.items for share in pool.shares):
                killed = True
                nodes.kill(nodes.standing[0])
                nodes.standing[0] = nodes.add()
        shares = pool.shares
    assert not [outcome for outcome in outcomes if isinstance(outcome, Lost)]
    assert all(of == [number**2 for number in item] for item, of in squares(outcomes).items())
    assert len(shares) == 4
    assert sum(share.died for share in shares) == 1


def test_a_result_that_is_done_outlives_its_node_while_nobody_takes_it(nodes: Nodes, tmp_path: Path) -> None:
    with pool_on(nodes, partial(Noting, tmp_path), need=Need(max=1)) as pool:
        outcomes = []
        for outcome in pool.map(single(2)):
            outcomes.append(outcome)
            if len(outcomes) == 1:
                (worker,) = pool._workers
                (waiting,) = worker.tasks.values()
                assert waiting.arriving is not None
                waiting.arriving.result()  # is here
                nodes.kill(nodes.at_work())
    assert {outcome.item: int(outcome.result[0]) for outcome in outcomes} == {(0,): 0, (1,): 1}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "begun\n", "1": "begun\n"}


def test_what_a_worker_raises_is_raised_here_and_says_where(nodes: Nodes) -> None:
    with pool_on(nodes, Squares, need=Need(max=1)) as pool:
        with pytest.raises(DataError, match="no square of 40404") as caught:
            list(pool.map([(1,), (40404,)], named=lambda item: f"number {item[0]}"))
        (after,) = pool.map([(2,)])
    assert re.fullmatch(r"node .+ \(\w{6}\), number 40404", caught.value.__notes__[0])
    assert isinstance(after, Done)


@pytest.mark.parametrize(
    ("make", "error", "said"), [(Refusing, DataError, "no such mount"), (Dying, ClusterError, "died before they began")]
)
def test_workers_that_cannot_begin_end_the_run(nodes: Nodes, make: Any, error: type[Exception], said: str) -> None:
    with pool_on(nodes, make, need=Need(max=1)) as pool, pytest.raises(error, match=said):
        list(pool.map(single(3)))


def test_a_node_with_another_version_is_named_with_both(nodes: Nodes, tmp_path: Path) -> None:
    installed = tmp_path / "slca_pipeline-9.9.9.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: slca-pipeline\nVersion: 9.9.9\n")
    node = nodes.add(num_gpus=1, env_vars={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    with pytest.raises(ClusterError) as caught, pool_on(nodes, Refusing, need=Need(gpus=1, max=1)) as pool:
        list(pool.map(single(1)))
    nodes.dismiss(node)
    here = metadata.version("slca-pipeline")
    said = rf"node .+ \(\w{{6}}\) has slca-pipeline 9\.9\.9 and this machine has {here}: install the same version on .*"
    assert re.fullmatch(said, str(caught.value))


def test_fractions_share_a_gpu_and_the_memory_and_without_a_word_each_worker_gets_one(nodes: Nodes) -> None:
    node = nodes.add(num_cpus=4, num_gpus=2)
    with connected(nodes.address) as cluster:
        assert cluster.settled(Need()) == Need(1.0, 2.0, 1, None)
        with hired(cluster, partial(Counting, 0.2), need=Need(gpus=0.5, cpus=0.5), name="halves") as pool:
            processes, beside = set[int](), set[int]()
            give_up = time.monotonic() + 60
            items = iter(lambda: len(processes) == 4 or time.monotonic() > give_up, True)
            for outcome in pool.map((1,) for _ in items):
                processes.add(outcome.result[0])
                beside.update(outcome.result[1])
    nodes.dismiss(node)
    assert len(processes) == 4
    assert beside == {4}


def test_an_address_where_nobody_answers_is_an_error_that_says_so() -> None:
    with (
        pytest.raises(ClusterError, match=r"no Ray cluster at '127\.0\.0\.1:1'.*refused.*ray start"),
        connected("127.0.0.1:1"),
    ):
        pass


def test_a_machine_too_busy_to_start_a_cluster_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(**_: Any) -> None:
        message = "The current node timed out during startup."
        raise Exception(message)

    monkeypatch.setattr("ray.init", late)
    with pytest.raises(ClusterError, match="could be started on this machine: The current node timed out"), connected():
        pass


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs the extra 'ray'.*slca-pipeline\[ray\]"), connected():
        pass


LOCAL = """
from functools import partial
from pipeline.cluster import connected, hired
from tests.ray.jobs import Squares
with connected() as cluster:
    pass
with connected() as cluster, hired(cluster, partial(Squares, 30.0), name="slow") as pool:
    handed = pool.map([(1,), (2,)])
    import threading
    threading.Timer(0.5, lambda: print("at work", flush=True)).start()
    next(handed)
"""


def test_a_second_local_cluster_of_a_process_ends_with_it() -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", LOCAL],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "at work\n"
    driver.send_signal(signal.SIGINT)
    out, errors = driver.communicate(timeout=20)
    assert driver.returncode == -signal.SIGINT, errors
    assert out == ""
    left = what_is_left()
    assert not left, left


def test_the_folder_of_a_cluster_goes_although_its_processes_still_write_there() -> None:
    with own_folder() as folder:
        (folder / "log").write_text("")
        program = (
            "import pathlib, sys, time\n"
            "end, folder = time.monotonic() + 0.6, pathlib.Path(sys.argv[1])\n"
            "while time.monotonic() < end and folder.exists():\n"
            "    for _ in range(200):\n"
            "        (folder / str(time.monotonic_ns())).touch()\n"
        )
        late = subprocess.Popen([sys.executable, "-c", program, folder], stderr=subprocess.DEVNULL)
        while len(list(folder.iterdir())) < 3:
            assert late.poll() is None
            time.sleep(0.01)
    late.wait(5)
    assert not folder.exists()
