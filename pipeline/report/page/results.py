"""What came out: scores, operating points, other prevalences, curves, subgroups, pictures, studies."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.report.caveats import caveats
from pipeline.report.evidence import Evidence
from pipeline.report.page import figures
from pipeline.report.page.html import Markup, folded, prose, table, tag
from pipeline.report.page.tables import (
    class_rows,
    elsewhere_sets,
    elsewhere_table,
    localisation_table,
    point_name,
    point_tables,
    points_table,
    score_rows,
    study_table,
    subgroup_table,
)


def results(evidence: Evidence) -> Iterator[Markup]:
    """Scores in numbers."""
    found = evidence.figures
    drawn, units = found["bootstrap"], evidence.units
    on = units.count(found["n"], drawn["groups"])
    yield tag("h2", "Results", id="results")
    yield table(
        ["score", "value", "95 % interval"], score_rows(found), caption=f"Scores on {on} of the {found['split']} set"
    )
    what = (
        "patients with replacement, so that images of one patient come and go together"
        if units.grouped
        else ("images with replacement, each as if it were a patient of its own")
    )
    yield tag(
        "p",
        f"Intervals: {drawn['resamples']:,} draws of the {drawn['groups']} {what} (seed {drawn['seed']}); for shares "
        "(accuracy, sensitivity, specificity, predictive values, prevalence) exact ones, Clopper and Pearson's, at the "
        "number of images that the patients are worth.",
        class_="quiet",
    )
    head = ["class", "AUC", "average precision", "sensitivity", "specificity"]
    caption = f"Scores by class on {found['n']} images; the likeliest class, or a probability above .5, decides"
    yield table(head, class_rows(found), caption=caption)


def decisions(evidence: Evidence) -> Iterator[Markup]:
    """Operating points, predictive values, and whether acting on the model is worth it."""
    found, name, point = evidence.figures, evidence.positive, evidence.point
    yield tag("h2", "Acting on it", id="acting")
    yield tag(
        "p",
        "PPV: of those called, the share that has it. NPV: of those cleared, the share that has it not. Both hold at "
        f"the prevalence of this {found['split']} set and at no other. TP, FP, FN, TN: true and false positives and "
        "negatives, as counts of images. Thresholds were chosen on val and are used as they are.",
    )
    if name is None:
        yield from point_tables(found)
    elif found["operating_points"]:
        yield points_table(found, name)
        yield folded("Every class at each operating point", *point_tables(found))
    if not found["operating_points"]:
        yield tag("p", "There is no validation set, so no thresholds were chosen.")
    if name is None:
        names = found["class_auc"]
    else:
        names = [name]
        if point is not None:
            yield tag("h3", f"At another prevalence of {name}")
            yield tag("p", f"At the threshold that gives {point_name(point)}.")
            yield elsewhere_table(found["operating_points"][point][name], name)
    yield tag("div", *(figures.decision_curve(evidence, each) for each in names), class_="figures")


def subgroups(evidence: Evidence) -> Iterator[Markup]:
    """Scores of parts of the test set."""
    found = evidence.figures["subgroups"]
    yield tag("h2", "By subgroup", id="subgroups")
    if not found:
        yield tag(
            "p",
            "The data set names no columns for subgroups (data.subgroup_columns of a table), so nothing is known of "
            "how the result differs by sex, age, site or scanner.",
        )
        return
    name, point = evidence.positive, evidence.point
    at = f" at the threshold that gives {point_name(point)}" if name is not None and point is not None else ""
    of = f" for {name}{at}" if name is not None else ""
    yield tag(
        "p",
        f"Each subgroup by itself{of}. Small subgroups have wide intervals, and among many subgroups one differs by "
        "chance: a difference counts only where the intervals are apart and somebody expected it before.",
    )
    for column, parts in found.items():
        yield subgroup_table(column, parts, evidence.units, name)


def curves(evidence: Evidence) -> Iterator[Markup]:
    """Curves and the confusion matrix."""
    yield tag("h2", "Curves", id="curves")
    many = evidence.positive is not None and len(evidence.description.class_names) > 2
    drawn = [
        figures.roc(evidence) if many else None,
        figures.precision_recall(evidence),
        figures.calibration(evidence),
        figures.confusion(evidence),
        figures.loss(evidence),
        figures.val_auc(evidence),
    ]
    yield tag("div", *drawn, class_="figures")


def pictures(evidence: Evidence) -> Iterator[Markup]:
    """Where the model looked."""
    found = evidence.pictures
    if found is None:
        return
    score = found.found["localisation"]
    yield tag("h2", "Where it looks", id="looks")
    if "strips" in found.found["sheet"]:
        yield from figures.strips(found)
    else:
        yield figures.sheet(found)
    if score is not None:
        yield localisation_table(score)
    if found.found.get("overlay"):
        yield from figures.masks(found)


def elsewhere(evidence: Evidence) -> Iterator[Markup]:
    """Scores on external test sets."""
    if not evidence.elsewhere:
        return
    yield tag("h2", "On data from elsewhere", id="elsewhere")
    yield tag("p", "Thresholds are those of the run's own val; nothing was chosen on these images.")
    yield elsewhere_sets(evidence.elsewhere, evidence.positive, evidence.point)


def beside_others(evidence: Evidence) -> Iterator[Markup]:
    """The study that holds this run."""
    study = evidence.study
    if study is None:
        return
    yield tag("h2", "Beside other runs", id="study")
    yield tag("p", f"The study {study.name}: the mean over seeds, and the paired difference to its baseline.")
    if study.cross_validated:
        said = (
            "It is a cross-validation: a score is that of all samples, each scored by the fold in which it was test, "
            "with its interval over patients."
        )
        yield tag("p", said)
    if not study.compares:
        yield tag("p", "It does not hold this run together with one that differs from it in the gates alone.")
    drawn = figures.efficiency(study)
    if drawn is not None:
        yield drawn
    yield study_table(study)


def limits(evidence: Evidence) -> Iterator[Markup]:
    """What a careful reader must not conclude."""
    yield tag("h2", "What this result does not show", id="limits")
    found = caveats(
        evidence.description,
        evidence.figures,
        evidence.data,
        generated=evidence.generated,
        untrained=evidence.untrained,
        compared=evidence.study is not None and evidence.study.compares,
        leaks=len(evidence.leaks) if evidence.checked else None,
    )
    yield tag("ul", *(tag("li", *prose(sentence)) for sentence in found))
    yield from (tag("p", *prose(note)) for note in evidence.notes)
