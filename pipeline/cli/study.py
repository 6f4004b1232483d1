"""`pipeline study` and `pipeline compare`: many runs in one table, and two runs side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import on_ray
from pipeline.cli.pages import of_nodes
from pipeline.cli.terminal import DONE, INCOMPLETE, bars, examples, printable, say, show

_NAMES = {"auc": "AUC", "ap": "average precision", "acc": "accuracy", "balanced_acc": "balanced accuracy",
          "f1": "macro F1", "kappa": "quadratic kappa", "ece": "calibration error (ECE)", "brier": "Brier score",
          "class_auc": "AUC", "class_ap": "average precision"}  # fmt: skip

_SIDES = (("first", "second"), ("second", "first"))  # each run, and the other


@click.command(
    epilog=examples("pipeline compare runs/plain runs/demo", "pipeline compare runs/plain runs/demo --json"),
)
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option(
    "--resamples", default=2000, show_default=True, type=click.IntRange(min=1), help="Draws of the bootstrap."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the draws.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def compare(first: Path, second: Path, resamples: int, seed: int, as_json: bool) -> int:
    """Is run SECOND better than run FIRST? Both evaluated, on the same test samples.

    Differences are SECOND less FIRST, each with a 95 % interval and a two-sided p: by bootstrap over groups (patients)
    for every score, and by DeLong's test for AUC.
    """
    from pipeline.evaluate.compare import compare as compare_runs

    report = compare_runs(first, second, resamples=resamples, seed=seed)
    if as_json:
        return show({"first": str(first), "second": str(second), **report}, as_json)
    caption = (
        f"{report['n']} test samples of {report['groups']} groups; 95 % intervals and p from {report['resamples']} "
        f"draws of groups, for AUC also by DeLong's test. Differences: {second} less {first}.\n"
        f"{_apart(report['other_settings'], other_gates=report['other_gates'])}\n"
        "This is one training of each, with one seed: it says which of these two runs is better, and is no evidence "
        "about the method. `pipeline study` compares over seeds."
    )
    _print_table(["score", "first", "second", "difference [95 %]", "p"], list(_compared(report)), caption)
    return DONE


@click.command(
    epilog=examples(
        "pipeline study -c configs/studies/demo_small.yaml --prepare",
        "pipeline study -c configs/studies/demo_folds.yaml --prepare",
        "pipeline study -c configs/studies/demo_small.yaml --set resources.device=cuda:1",
        "pipeline study -c configs/studies/demo_small.yaml --ray auto",
    )
)
@click.option(
    "-c",
    "--config",
    "config_path",
    required=True,
    type=click.Path(path_type=Path),
    help="The study (see configs/studies).",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of every run; repeatable.")
@click.option("--prepare", "prepare_first", is_flag=True, help="First make what the runs read: data, weights, stores.")
@click.option("--prepare-only", is_flag=True, help="Make what the runs read, and no run.")
@click.option("--tables-only", is_flag=True, help="Make no run: only the tables of those that are done.")
@on_ray
@click.option("--replace", is_flag=True, help="Make runs again whose samples or images have changed since.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def study(
    config_path: Path,
    overrides: tuple[str, ...],
    prepare_first: bool,
    prepare_only: bool,
    tables_only: bool,
    replace: bool,
    ray: str | None,
    as_json: bool,
) -> int:
    """Train and evaluate many variants, fractions and seeds; put them into one table.

    Runs that are done are skipped, so the same command continues a study that was stopped. Started several
    times at once on one machine, the processes share its runs. With --ray the workers of a cluster make them.
    """
    if prepare_only and tables_only:
        message = "--prepare-only and --tables-only exclude each other: choose one"
        raise click.UsageError(message)
    from pipeline.stages import studies
    from pipeline.stages.study_plan import load_study

    plan = load_study(config_path, overrides)
    with bars() as progress:
        if prepare_first or prepare_only:
            prepared = studies.prepare(plan, progress, ray=ray)
            if prepare_only:
                return show({"study": str(plan.folder), "stores": prepared}, as_json)
        report = studies.study(plan, progress, tables_only=tables_only, replace=replace, ray=ray)
    if as_json:
        show(report, as_json)
    else:
        _show_study(report)
    return INCOMPLETE if report["missing"] else DONE


def _show_study(report: Mapping[str, Any]) -> None:
    from pipeline.study.files import FOLDS_LEGEND, absence, fold_lines, legend, table_lines

    if report.get("folds"):
        head, *lines = fold_lines(report["folds"])
        _print_table(head, lines, FOLDS_LEGEND)
    said = legend(report["baseline"], cross_validated="folds" in report)
    head, *lines = table_lines(report["table"], report["baseline"], brief=True)
    _print_table(head, lines, f"{said}\n{absence(report['missing'])}\n{report['study']}")
    of_nodes(report)
    for name, reason in report["failed"].items():
        say(f"not made: {name}: {reason}", err=True)


def _apart(settings: Sequence[Mapping[str, Any]] | None, *, other_gates: bool) -> str:
    """What can have made a difference: the gates alone, or which settings."""
    from cache.fingerprint import MISSING
    from pipeline.train.run_folder import brief

    if settings is None:
        return "What else differs between them is unknown: a run was trained by an older version of this program."
    apart = "Apart from the gates, " if other_gates else ""
    if not settings:
        return f"{apart}{'both' if apart else 'Both'} runs have the same settings."
    alone = {
        side: dict.fromkeys(".".join(s["setting"].split(".")[:2]) for s in settings if s[other] == MISSING)
        for side, other in _SIDES
    }
    listed = [
        f"{s['setting']} ({brief(s['first'])}, {brief(s['second'])})"
        for s in settings
        if MISSING not in (s["first"], s["second"])
    ]
    said = [f"they differ in {'; '.join(listed)}"] if listed else []
    said += [f"the {side} alone has {', '.join(names)}" for side, names in alone.items() if names]
    sentence = f"{apart}{'; '.join(said)}."
    return sentence[0].upper() + sentence[1:]


def _compared(report: Mapping[str, Any]) -> Iterator[list[str]]:
    """Lines of the table: each score, each score of each class, and DeLong's test."""
    for name, figures in report["scores"].items():
        spelled = _NAMES.get(name, name)
        if isinstance(figures["first"], Mapping):
            for of_class in figures["first"]:
                yield _line(f"{spelled}, {of_class}", {key: value[of_class] for key, value in figures.items()})
        else:
            yield _line(spelled, figures)
    for name, figures in report["delong"].items():
        known = report["scores"]["auc"] if name == "auc" else None
        of_class = report["scores"]["class_auc"]
        first, second = (known[k] if known else of_class[k][name] for k in ("first", "second"))
        label = "AUC, DeLong" if known else f"AUC, {name}, DeLong"
        yield _line(label, {**figures, "first": first, "second": second})


def _line(label: str, figures: Mapping[str, float]) -> list[str]:
    p = "< .001" if figures["p"] < 0.001 else f"{figures['p']:.3f}"
    between = f"{figures['difference']:+.3f} [{figures['low']:+.3f}, {figures['high']:+.3f}]"
    return [label, f"{figures['first']:.3f}", f"{figures['second']:.3f}", between, p]


def _print_table(head: Sequence[str], lines: Sequence[Sequence[str]], caption: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(head):
        table.add_column(Text(printable(column)), justify="left" if number == 0 else "right")
    for line in lines:
        table.add_row(*(Text(printable(cell)) for cell in line))  # not as markup: an interval is in brackets
    console = Console()
    console.print(table)
    console.print(Text("\n".join(printable(part) for part in caption.splitlines() if part)))
