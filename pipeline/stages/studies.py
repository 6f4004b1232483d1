"""What `pipeline study` does: makes what its runs read if asked to, trains and evaluates each, writes the tables."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from pipeline.config.schema import Config
from pipeline.errors import ConfigError, RunError
from pipeline.progress import Progress
from pipeline.stages import commands
from pipeline.stages.arguments import model_options
from pipeline.stages.commands import Report
from pipeline.stages.inputs import finished
from pipeline.stages.loaded import Shared
from pipeline.stages.study_plan import Study
from pipeline.stages.study_workers import Bench, check_inputs, make_run, on_cluster
from pipeline.study.files import write_files
from pipeline.study.runs import (
    Planned,
    Row,
    alone,
    forget_result,
    one_by_one,
    result_of,
    work_through,
)
from pipeline.study.table import Summary
from pipeline.train.identity import changed_inputs

TABLES_EVERY_SECONDS = 30.0  # while runs are made, so that a study that is killed leaves tables


def study(
    plan: Study, progress: Progress, *, tables_only: bool = False, replace: bool = False, ray: str | None = None
) -> Report:
    """Make the runs of a study that are not done, and its tables.

    Args:
        plan: The study.
        progress: Called after each run, and by each run that is made in this process.
        tables_only: Make no run: only the tables of those that are done.
        replace: Make runs again that rest on other inputs than are there now (see `identity.inputs_of`).
        ray: Have them made on the cluster at this address (see `pipeline.cluster.connected`).

    Raises:
        ConfigError: It was started as one process of several that train together.
        RunError: No run is done, and none was to be made; or runs rest on other inputs than are there now.
        cache.StoreError: A store that some run reads is not there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        message = "a study is not started by torchrun: start `pipeline study` several times, and they share its runs"
        raise ConfigError(message)
    summary = Summary(plan.runs, plan.baseline, plan.scores)
    failed: dict[str, str] = {}
    nodes: list[Report] = []
    if not tables_only:
        failed = _make_runs(plan, summary, progress, replace=replace, ray=ray, nodes=nodes)
    table = _write(plan, summary)
    done = sum(result_of(planned) is not None for planned in plan.runs)
    if not done:
        why = next(iter(failed.values()), "run the study without asking for the tables only")
        message = f"no run of {str(plan.folder)!r} is done: {why}"
        raise RunError(message)
    if not table:
        why = next(iter(failed.values()), "run the study again to make the others")
        message = f"{done} of the {len(plan.runs)} runs of {str(plan.folder)!r} are done, and all folds of none: {why}"
        raise RunError(message)
    return {
        "study": str(plan.folder),
        "runs": len(plan.runs),
        "done": done,
        "missing": len(plan.runs) - done,
        "failed": failed,
        "baseline": plan.baseline,
        "table": table,
        **({"folds": summary.folds()} if summary.cross_validated else {}),
        **({"nodes": nodes} if nodes else {}),
    }


def prepare(plan: Study, progress: Progress, *, ray: str | None = None) -> Report:
    """Have everything that the runs read: data, weights of encoders and backbones, and complete stores.

    Several processes may ask for it at once: one works, the others wait and find it done.

    Args:
        plan: The study.
        progress: Called as it goes on.
        ray: Have stores made on the cluster at this address.
    """
    report: Report = {}
    plan.folder.mkdir(parents=True, exist_ok=True)
    with alone(plan.folder / "preparing", plan.folder):
        for config, reads_store in _distinct(plan):
            commands.prepare(config, progress, encoder=reads_store)
            store = str(config.store.path)  # runs that name the same one mean the same features (see `load_study`)
            if reads_store and store not in report:
                made = finished(config, progress) or commands.extract(config, progress, ray=ray)
                report[store] = {key: made[key] for key in ("rows", "encoded", "reused")}
    return report


def _distinct(plan: Study) -> Iterator[tuple[Config, bool]]:
    """One configuration for each combination of data, encoder, store and weights that runs read; whether of a store."""
    seen = set()
    for name, config in plan.configs.items():
        reads_store = plan.reads_store(name)
        what = config.model_dump_json(include={"data", "encoder", "store"} if reads_store else {"data"})
        key = (what, config.model.backbone, config.model.weights)
        if key not in seen:
            seen.add(key)
            yield config, reads_store


def _make_runs(
    plan: Study, summary: Summary, progress: Progress, *, replace: bool, ray: str | None, nodes: list[Report]
) -> dict[str, str]:
    shared, written = Shared(), time.monotonic()

    def make(planned: Planned, tell: Progress) -> Row:
        return make_run(plan, planned, tell, shared=shared, replace=replace)

    def tidy(planned: Planned) -> None:
        nonlocal written
        if not plan.keep_weights:
            (planned.folder / "model.safetensors").unlink(missing_ok=True)
        if time.monotonic() - written > TABLES_EVERY_SECONDS:
            _write(plan, summary)
            written = time.monotonic()

    try:
        check_inputs(plan, shared)
        plan.folder.mkdir(parents=True, exist_ok=True)
        with alone(plan.folder / "preparing", plan.folder):
            _look_for_stale(plan, shared, replace=replace)
        crew = one_by_one(make, progress)
        if ray is not None:
            bench = Bench(plan, shared.stores, replace)
            crew = on_cluster(bench, ray, nodes, progress)
        return work_through(plan.runs, crew, after_each=tidy, progress=progress)
    finally:
        shared.close()


def _look_for_stale(plan: Study, shared: Shared, *, replace: bool) -> None:
    """Find done runs that rest on other inputs than are there now: forget their results, or refuse."""
    stale: list[tuple[Planned, list[str]]] = []
    for planned in plan.runs:
        if result_of(planned) is not None:
            config = plan.configs[planned.name]
            store = shared.store(config) if plan.reads_store(planned.name) else None
            weights = model_options(config).weights_file
            changed = changed_inputs(planned.folder, shared.dataset(config), store, weights)
            if changed:
                stale.append((planned, [difference.field for difference in changed]))
    if stale and not replace:
        first, fields = stale[0]
        message = (
            f"{len(stale)} of the finished runs of {str(plan.folder)!r}, among them {first.name!r}, rest on other "
            f"inputs than are there now ({', '.join(fields)}): make them again with --replace, or give the study "
            f"another folder"
        )
        raise RunError(message)
    for planned, _ in stale:
        forget_result(planned)


def _write(plan: Study, summary: Summary) -> list[Row]:
    """Write the tables, one process at a time."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    with alone(plan.folder / "writing", plan.folder, wait_seconds=0.1):
        return write_files(plan.folder, summary)
