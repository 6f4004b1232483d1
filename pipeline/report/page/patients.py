"""Who is in the data: the way from files to figures, the classes of each split, and whether splits leak."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.report.cohort import Part
from pipeline.report.evidence import Evidence
from pipeline.report.page.html import Markup, table, tag
from pipeline.report.verdict import counted

_LEAKS_SHOWN = 10
_USED = {"train": "trained on", "val": "chosen on", "test": "scored"}


def patients(evidence: Evidence) -> Iterator[Markup]:
    """The section."""
    data, units = evidence.data, evidence.units
    yield tag("h2", "Patients and images" if units.grouped else "Images", id="cohort")
    yield _flow(evidence)
    names = evidence.description.class_names
    rows = [
        [split, found["samples"], *([found["groups"]] if units.grouped else [])]
        + [
            f"{found['classes'][name]} ({100 * found['classes'][name] / max(found['samples'], 1):.0f} %)"
            for name in names
        ]
        for split, found in data["splits"].items()
    ]
    head = ["split", "images", *(["patients"] if units.grouped else []), *names]
    yield table(head, rows, caption="Images of each class, and their share of the split")
    yield tag("h3", "Leak check")
    yield tag("ul", *_checks(evidence), class_="checks")
    if evidence.leaks:
        shown = [tag("li", ", ".join(same)) for same in evidence.leaks[:_LEAKS_SHOWN]]
        more = len(evidence.leaks) - len(shown)
        yield tag("p", "These are the same:")
        yield tag("ul", *shown, tag("li", f"and {more} more") if more > 0 else None)


def _flow(evidence: Evidence) -> Markup:
    """Boxes from what was found to what was used."""
    cohort, units = evidence.cohort, evidence.units
    ignored = sum(cohort.ignored.values())
    groups = sum(part.groups for part in cohort.parts)
    steps = []
    if ignored:
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in cohort.ignored.items())
        steps += [
            tag("li", tag("b", f"Found: {counted(cohort.found, 'file')}")),
            tag("li", f"Ignored, being no images of the data set: {ignored} ({kinds})", class_="out"),
        ]
    begin = "In the data set" if ignored else "Found"
    steps.append(tag("li", tag("b", f"{begin}: {units.count(cohort.images, groups)}")))
    steps.append(tag("li", tag("ul", *(_part(evidence, part) for part in cohort.parts)), class_="splits"))
    used = sum(part.used for part in cohort.parts)
    finding = f"Of {counted(cohort.found, 'file' if ignored else 'image')} found {used} are used."
    if cohort.reasons:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in list(cohort.reasons.items())[:3])
        finding += f" Why images were set aside: {reasons}."
    caption = tag("figcaption", tag("strong", "The way to the figures. "), finding)
    return tag("figure", tag("ol", *steps, class_="flow"), caption, class_="wide")


def _part(evidence: Evidence, part: Part) -> Markup:
    units = evidence.units
    lost = [
        (part.set_aside, "set aside, for they cannot be read"),
        (part.missing, "missing in the store"),
        (part.left_out, _why_left_out(evidence, part)),
    ]
    return tag(
        "li",
        tag("b", f"{part.split}: {units.count(part.images, part.groups)}"),
        *(tag("span", f"{count} {why}", class_="out") for count, why in lost if count),
        tag("span", f"{_USED[part.split]}: {units.count(part.used, part.used_groups)}", class_="used"),
    )


def _why_left_out(evidence: Evidence, part: Part) -> str:
    training = evidence.description.training
    if part.split == "train" and training.get("shots") is not None:
        return "left out by train.shots"
    if part.split == "train" and training.get("fraction", 1.0) < 1:
        return "left out by train.fraction"
    if not part.used:
        return "not looked at"
    return "not used; why was not recorded"


def _checks(evidence: Evidence) -> Iterator[Markup]:
    groups = sum(found["groups"] for found in evidence.data["splits"].values())
    if evidence.data["grouped"]:
        yield tag("li", f"No patient lies in more than one split ({groups} patients).", class_="good")
    else:
        said = "Which images are of the same patient is not known; every image counts as a patient of its own."
        yield tag("li", said, class_="open")
    if evidence.leaks:
        said = f"Identical images in more than one split: {len(evidence.leaks)}"
        yield tag("li", tag("b", said), f" (SHA-256 of the pixels of {evidence.checked} images).", class_="bad")
    elif not evidence.checked:
        said = "Whether two splits share an image is not known: there are no images here, and no digests of them."
        yield tag("li", said, class_="open")
    else:
        said = f"No two splits share an image: the SHA-256 of the pixels of {evidence.checked} images were compared."
        yield tag("li", said, class_="good")
    if evidence.unreadable:
        said = f"Images that cannot be read, and so could not be compared: {len(evidence.unreadable)}."
        yield tag("li", tag("b", said), class_="bad")
    if evidence.store is not None:
        if evidence.changed:
            said = f"Images with other pixels now than when their features were made: {evidence.changed}."
            yield tag("li", tag("b", said), class_="bad")
        else:
            yield tag("li", "The features were made from these very pixels.", class_="good")
