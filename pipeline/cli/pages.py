"""What a command's report looks like to a person: a page that fits a screen. JSON has all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.cli.tables import counts_table, ignored_line, print_table
from pipeline.cli.terminal import say

Report = Mapping[str, Any]
_CLASSES = 10  # shown one by one; the files have them all
_ROWS_OF_POINTS = 12
_SCORES = {
    "auc": "AUC",
    "ap": "average precision",
    "acc": "accuracy",
    "balanced_acc": "balanced accuracy",
    "f1": "F1",
    "kappa": "kappa",
    "ece": "calibration error",
    "brier": "Brier",
}
_SHARES = ("sensitivity", "specificity", "ppv", "npv")


def figure(value: float | None) -> str:
    """A share with three digits and no leading zero, as `.802`; 1 as `1.00`."""
    if value is None:
        return "-"
    text = f"{value:.3f}"
    if text.startswith(("0.", "-0.")):
        return text.replace("0.", ".", 1)
    return text[:-1]


def with_interval(value: float | None, ends: Mapping[str, float] | None) -> str:
    """A score and its interval: `.802 [.714, .873]`."""
    if not ends or value is None or "low" not in ends:
        return figure(value)
    return f"{figure(value)} [{figure(ends['low'])}, {figure(ends['high'])}]"


def prepared(report: Report) -> None:
    """What `prepare` leaves: classes by split, what is ignored, the weights."""
    found = report["data"]
    say(f"data       {found['path']}: {found['counts']['images']} images")
    counts_table(found["counts"])
    if found["ignored"]:
        say(f"ignored    {ignored_line(found['ignored'])}")
    for name in ("encoder", "backbone"):
        weights = report.get(name) or {}
        if weights:
            digest = f", sha256 {weights['sha256'][:12]}" if "sha256" in weights else ""
            dice = f"; Dice from a point {figure(weights['dice'])}" if "dice" in weights else ""
            recall = f", {figure(weights['recall'])} of lesions found unasked" if "recall" in weights else ""
            made = f"{dice}{recall}, on images of its own" if dice else ""
            say(f"{name:10} {weights.get('checkpoint') or weights.get('weights')}{digest}{made}")
    for note in found["notes"]:
        say(f"warning    {note}")


def extracted(report: Report) -> None:
    """What `extract` did, in numbers of images."""
    changes = report["changes"]
    said = ", ".join(f"{number} {what}" for what, number in changes.items() if number or what == "reused")
    say(f"store      {report['store']}: {report['rows']} rows" + (f"; {said}" if said else ""))
    seconds = report["seconds"]
    took = f"{seconds['total']:.1f} s"
    if report["encoded"] and seconds.get("encode"):
        took += f", {seconds['encode'] / report['encoded']:.3g} s an image for the encoder alone"
    say(f"time       {took}")
    of_nodes(report)
    if report["advice"]:
        say(f"advice     {report['advice']}")
    aside = report["set_aside"]
    if aside:
        say(f"set aside  {len(aside)} images, which the store lacks:")
        for name, reason in list(aside.items())[:_CLASSES]:
            say(f"           {reason if name in reason else f'{name}: {reason}'}")
        if len(aside) > _CLASSES:
            say(f"           and {len(aside) - _CLASSES} more (--json has them)")
        say("           mend or remove the files and extract again, or train with train.allow_missing=true")


def of_nodes(report: Report) -> None:
    """What each node of a cluster did, on a line."""
    for node in report.get("nodes", ()):
        died = f", {node['died']} of them died" if node["died"] else ""
        did = f"{node['images']} images, {node['images_per_s']:.3g} images/s" if "images" in node else ""
        did = did or f"{node['runs']} runs"
        say(
            f"node       {node['node']}: {did}, {node['workers']} workers{died}, busy {node['busy_seconds']:.0f} s, "
            f"waiting {node['waiting_seconds']:.0f} s"
        )


def trained(report: Report) -> None:
    """What `train` leaves: the best epoch and its scores on val."""
    val = report["val"] or {}
    say(f"run        {report['run']}: best epoch {report['epoch']}, chosen on val")
    shown = [f"{_SCORES[key]} {figure(val[key])}" for key in ("auc", "acc", "balanced_acc") if val.get(key) is not None]
    if shown:
        say(f"val        {', '.join(shown)} on {val['n']} images")
    for line in report["data"] or ["not read: the run was finished before"]:
        say(f"data       {line}")
    parameters = report["parameters"]
    of_gates = f", {parameters['slca']:,} of them in gates" if parameters.get("slca") else ""
    say(f"model      {parameters['trainable']:,} parameters to train{of_gates}")
    if painted := report.get("overlay"):
        told = ", ".join(f"{of['without_masks']} of {of['images']} in {split}" for split, of in painted.items() if of)
        say(f"overlay    images without any mask, taken as they are: {told}")
    if spreads := report.get("gate_spread"):
        low, high = figure(min(spreads.values())), figure(max(spreads.values()))
        told = low if low == high else f"{low} to {high}"
        say(f"gates      {report.get('flat_gates') or f'vary by {told} over an image (standard deviation)'}")


def evaluated(report: Report) -> None:
    """The scores of a run, on a screen."""
    ends, n = report["intervals"], report["n"]
    patients = report["bootstrap"]["groups"]
    of = f" of {patients} patients" if patients < n else ""
    say(f"{report['run']} on {report['split']}: {n} images{of}; intervals of 95 %")
    if report.get("data_changed"):
        say(f"The data are not those of the training any more. {report['data_changed']}")
    if report.get("also_learnt"):
        say(f"{report['also_learnt']}. On these the scores are no test.")
    say("")
    scores = [f"{_SCORES[key]} {with_interval(report[key], ends.get(key))}" for key in _SCORES if key in report]
    for left in range(0, len(scores), 2):
        say("  ".join(f"{score:38}" for score in scores[left : left + 2]).rstrip())
    say("")
    _class_rows(report)
    _point_rows(report)
    say("")
    folder = Path(report.get("folder", report["run"]))
    say(f"The rest: {folder / 'metrics.json'}, predictions.csv, and curves as .csv and .png beside them")


def _class_rows(report: Report) -> None:
    ends, names = report["intervals"], list(report["class_auc"])
    columns = {"class_auc": "AUC", "sensitivity": "sensitivity", "specificity": "specificity"}
    known = {key: title for key, title in columns.items() if isinstance(report.get(key), Mapping)}
    rows = [
        [
            f"{name} (+)" if name == report.get("positive") else name,
            round(report["prevalence"][name] * report["n"]) if "prevalence" in report else "",
            *(with_interval(report[key].get(name), ends.get(key, {}).get(name)) for key in known),
        ]
        for name in names
    ]
    print_table(("class", "n", *known.values()), rows, most=_CLASSES)


def _point_rows(report: Report) -> None:
    """A row per operating point: of the class that is looked for, or of each class."""
    points: Mapping[str, Mapping[str, Any]] = report["operating_points"]
    if not points:
        return
    names = list(report["class_auc"])
    one = report.get("positive") in names
    rows = []
    for point, found in points.items():
        for name in [report["positive"]] if one else names:
            at = found[name]
            shares = [at.get(key) or {} for key in _SHARES]  # none where nothing was called
            rows.append(
                [
                    point if one else f"{point}, {name}",
                    figure(at["threshold"]),
                    *(with_interval(share.get("value"), share) for share in shares[:2]),
                    *(figure(share.get("value")) for share in shares[2:]),
                ]
            )
    say("")
    title = f"threshold for {report['positive']}" if one else "threshold"
    print_table((f"{title} by", "from", "sensitivity", "specificity", "PPV", "NPV"), rows, most=_ROWS_OF_POINTS)


def predicted(report: Report) -> None:
    """A row per image: what is predicted, and the probabilities; of very many images, how many show which class."""
    if report["predictions"]:
        _prediction_rows(report["predictions"])
    else:
        say(f"images     {report['images']}, {report['kept']} of them in parts that were there already")
        for name, number in list(report["predicted"].items())[:_CLASSES]:
            say(f"predicted  {name}: {number}")
    reasons = list(report["set_aside"].values())
    shown = reasons if report["predictions"] else reasons[:_CLASSES]
    for reason in shown:
        say(f"set aside: {reason}")
    if len(reasons) > len(shown):
        say(f"set aside: {len(reasons) - len(shown)} more (--json has them, and a table beside the other)")
    of_nodes(report)
    if "out" in report:
        say(f"written to {report['out']}")


def _prediction_rows(found: Sequence[Mapping[str, Any]]) -> None:
    names = list(found[0]["probabilities"])
    shown = names if len(names) <= _CLASSES else []
    rows = [
        [
            row["image"],
            ", ".join(row["predicted"]) if isinstance(row["predicted"], list) else row["predicted"],
            *(figure(row["probabilities"][name]) for name in shown),
            *(() if shown else (figure(max(row["probabilities"].values())),)),
        ]
        for row in found
    ]
    print_table(("image", "predicted", *(shown or ("probability",))), rows, words=2, most=len(rows))
