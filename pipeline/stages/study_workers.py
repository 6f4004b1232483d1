"""The runs of a study on a cluster: each is made by a worker on some node, and ends in the study's folder here.

A worker maps the stores where its node sees them, so that the memory of a node has their features once, whatever number
of workers reads them. It writes into the study's own folder where it sees that, and a run whose worker died continues
from its last epoch; elsewhere it writes into a folder of its own, whose files travel back with the result.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import cache
from pipeline import records
from pipeline.cluster import Lost, connected, hired
from pipeline.errors import ConfigError, DataError, RunError
from pipeline.progress import Progress, silent
from pipeline.stages import commands
from pipeline.stages.arguments import model_options
from pipeline.stages.loaded import Shared
from pipeline.stages.nodes import need_of, on_this_node
from pipeline.stages.store_check import check_store
from pipeline.stages.study_plan import Study
from pipeline.study.runs import Crew, Planned, Row, claim_of, result_from
from pipeline.train import run_folder
from pipeline.train.feeding.feed import check_taps


def make_run(plan: Study, planned: Planned, progress: Progress, *, shared: Shared, replace: bool) -> Row:
    """Make one run of a study in the folder that it names, from the start or from where somebody left it.

    Args:
        plan: The study.
        planned: The run.
        progress: Called by it.
        shared: Data sets and stores that are loaded already.
        replace: Start over where the folder holds a run with other settings.

    Returns:
        Its result.
    """
    config = plan.configs[planned.name].model_copy(update={"run": planned.folder})
    if plan.commands[planned.name] == "probe":
        commands.probe(config, progress, folder=planned.folder, replace=replace, shared=shared)
    else:
        commands.train(config, progress, replace=replace, shared=shared)
    metrics = commands.evaluate(config, progress, shared=shared)
    return result_from(metrics, run_folder.read_history(planned.folder))


def check_inputs(plan: Study, shared: Shared) -> None:
    """Refuse at once what would fail hours later: no data set, no store or one without a tap, a score of no task."""
    tasks = set[str]()
    for name, config in plan.configs.items():
        tasks.add(shared.dataset(config).task)
        if plan.reads_store(name):
            check_store(config, shared.store(config))
            check_taps(shared.store(config), model_options(config).taps)
    if "kappa" in plan.scores and "ordinal" not in tasks:
        message = (
            f"scores: 'kappa' is that of grades in order (the task 'ordinal'), and the task of these data is "
            f"{', '.join(map(repr, sorted(tasks)))}: leave it out"
        )
        raise ConfigError(message)


@dataclass(frozen=True)
class Assignment:
    """A run to make.

    Attributes:
        planned: The run.
        claim: What its claim says in the study's folder: a node that reads the same sees that folder.
    """

    planned: Planned
    claim: bytes


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        said: Its result, or why it could not be made.
        files: Content by name below the run's folder; none where the worker wrote there itself.
    """

    said: Row | str
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class Bench:
    """What makes the runs of a study on any node that sees its data and its stores.

    Attributes:
        plan: The study.
        stores: Those that it reads, by path, of the very version that they have here.
        replace: See `make_run`.
    """

    plan: Study
    stores: Mapping[Path, cache.Store]
    replace: bool

    def __call__(self) -> Callable[[Assignment], Outcome]:
        """Begin on a node: look whether all is there, so that no run fails for it.

        Raises:
            DataError: The data are not there.
            cache.StoreError: A store is not there, or another version of it.
        """
        shared = Shared(self.stores)
        with on_this_node("the data and the stores of a study"):
            check_inputs(self.plan, shared)
        return lambda assignment: self._do(assignment, shared)

    def _do(self, assignment: Assignment, shared: Shared) -> Outcome:
        planned = assignment.planned
        if claim_of(planned) == assignment.claim:
            return Outcome(self._try(planned, shared), {})
        with tempfile.TemporaryDirectory(prefix="study-") as folder:
            moved = changed(planned, folder=Path(folder) / planned.name)
            said = self._try(moved, shared)
            return Outcome(said, {} if isinstance(said, str) else _content(moved.folder))

    def _try(self, planned: Planned, shared: Shared) -> Row | str:
        try:
            return make_run(self.plan, planned, silent, shared=shared, replace=self.replace)
        except (RunError, DataError) as error:
            return str(error)


def on_cluster(bench: Bench, address: str, nodes: list[dict[str, Any]], progress: Progress) -> Crew:
    """The crew of a cluster.

    Args:
        bench: What makes the runs.
        address: Of the cluster, see `pipeline.cluster.connected`.
        nodes: Is given what each node has done.
        progress: Told when no node has room for a worker.
    """
    plan = bench.plan
    need = need_of(plan.configs[plan.runs[0].name])  # all runs of a study say the same

    def tell(said: str) -> None:
        progress("ray", 1, 1, note=said)

    def crew(runs: Iterator[Planned]) -> Iterator[tuple[Planned, Row | str]]:
        first = next(runs, None)
        if first is None:
            return  # no cluster is asked for nothing
        with connected(address) as cluster, hired(cluster, bench, need=need, name=plan.name, tell=tell) as pool:

            def assignments() -> Iterator[Assignment]:
                yield Assignment(first, claim_of(first))
                for planned in runs:
                    yield Assignment(planned, claim_of(planned))

            for done in pool.map(assignments(), in_flight=1, named=lambda given: given.planned.name):
                planned = done.item.planned
                if isinstance(done, Lost):
                    yield planned, done.reason
                    continue
                for name, content in done.result.files.items():
                    (planned.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    with records.replacing(planned.folder / name) as file:
                        file.write(content)
                yield planned, done.result.said
            for share in pool.shares:
                said = asdict(share)
                nodes.append({"runs": said.pop("items"), **said})

    return crew


def _content(folder: Path) -> dict[str, bytes]:
    """All files of a finished run, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
