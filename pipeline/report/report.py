"""One page to send: a single HTML file that asks nothing of the network, runs no script, and reads well on paper too.

It holds no clock reading but those that were recorded, so that the same run gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from pipeline.report import figures
from pipeline.report.caveats import caveats
from pipeline.report.evidence import Evidence
from pipeline.report.html import Markup, escape, table, tag
from pipeline.report.tables import (
    class_rows,
    field_rows,
    interval,
    localisation_table,
    point_tables,
    score_rows,
    size,
    span,
    study_table,
    text_of,
    with_interval,
)
from pipeline.train import run_folder

FILE = "report.html"
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_LEAKS_SHOWN = 10
_GATE_OPTIONS = ("pool", "reduction", "normalise", "mix", "gain", "identity_start")
_IDENTITY = {
    "encoder": "encoder",
    "weights_sha256": "weights (SHA-256)",
    "masks_sha256": "masks (SHA-256)",
    "input_px": "side of the input, px",
    "taps": "taps",
    "pool": "pool, in tokens",
    "precision": "precision",
    "dtype": "type of the stored numbers",
}
_RECIPE = {
    "epochs": "epochs",
    "batch_size": "batch",
    "optimiser": "optimiser",
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "schedule": "schedule",
    "seed": "seed",
    "fraction": "share of the training set",
}
_TILES = (("auc", "AUC"), ("acc", "accuracy"), ("balanced_acc", "balanced accuracy"), ("ece", "calibration error"))


def write(folder: Path, evidence: Evidence) -> Path:
    """Write the page into the folder of the run."""
    with run_folder.replacing(folder / FILE) as file:
        file.write(render(evidence).encode())
    return folder / FILE


def render(evidence: Evidence) -> str:
    """Build the page."""
    sections = (
        _summary,
        _question,
        _data,
        _features,
        _model,
        _results,
        _figures,
        _study,
        _pictures,
        _limits,
        _costs,
        _reproduce,
        _settings,
    )
    body = [Markup(f"\n{part}") for section in sections for part in section(evidence)]
    style = files("pipeline.report").joinpath("report.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"Report on {evidence.name}"),
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup(f"\n{style}")),
    )
    page = tag("html", "\n", head, "\n", tag("body", tag("main", *body)), lang="en")
    return f"<!doctype html>\n{page}\n"


def _summary(evidence: Evidence) -> Iterator[Markup]:
    figures, model = evidence.figures, evidence.description.model
    ends = figures["intervals"]
    yield tag("h1", f"Report on {evidence.name}")
    kind = f"A gated {model.backbone}" if model.gates else f"A plain {model.backbone}"
    yield tag(
        "p",
        f"{kind} on the data set {evidence.data['name']}, scored on {figures['n']} {figures['split']} images of "
        f"{figures['bootstrap']['groups']} groups: ",
        tag("strong", f"AUC {with_interval(figures['auc'], ends['auc'])}"),
        ". In brackets, here and below, the 95 % interval.",
        class_="lead",
    )
    tiles = [
        tag("li", tag("b", f"{figures[name]:.3f}"), tag("span", label), tag("span", interval(ends[name])))
        for name, label in _TILES
    ]
    yield tag("ul", *tiles, class_="tiles")


def _question(evidence: Evidence) -> Iterator[Markup]:
    description, data = evidence.description, evidence.data
    model, names = description.model, description.class_names
    what = {
        "ordinal": f"tell the grades {_listed(names)}, in that order,",
        "multilabel": f"find {_listed(names)}, any number of them at once,",
    }.get(description.task, f"tell {_listed(names)} apart")
    yield tag("h2", "The question")
    if description.fingerprint is not None:
        encoder = description.fingerprint.fields.get("encoder", "a frozen encoder")
        yield tag(
            "p",
            f"How well does a {model.backbone} {what} on {data['name']}, when gates made from features of the frozen "
            f"encoder {encoder} weigh its feature maps?",
        )
    else:
        own = "with gates made from its own feature maps" if model.gates else "without gates"
        yield tag("p", f"How well does a {model.backbone} {own} {what} on {data['name']}?")


def _data(evidence: Evidence) -> Iterator[Markup]:
    data = evidence.data
    yield tag("h2", "Data and splits")
    names = evidence.description.class_names
    rows = [
        [split, found["samples"], found["groups"], *(found["classes"][name] for name in names)]
        for split, found in data["splits"].items()
    ]
    yield table(
        ["split", "images", "groups", *names], rows, caption="Images, groups (patients) and images of each class"
    )
    trained_on = evidence.description.provenance.get("trained_on")
    if trained_on is not None and trained_on != data["splits"]["train"]["samples"]:
        yield tag("p", f"Of the training images {trained_on} were used.")
    yield tag("h3", "Leak check")
    yield tag("ul", *_checks(evidence), class_="checks")
    if evidence.leaks:
        shown = [tag("li", ", ".join(same)) for same in evidence.leaks[:_LEAKS_SHOWN]]
        more = len(evidence.leaks) - len(shown)
        yield tag("p", "These are the same:")
        yield tag("ul", *shown, tag("li", f"and {more} more") if more > 0 else None)


def _checks(evidence: Evidence) -> Iterator[Markup]:
    groups = sum(found["groups"] for found in evidence.data["splits"].values())
    if evidence.data["grouped"]:
        yield tag("li", f"No group lies in more than one split ({groups} groups).", class_="good")
    else:
        said = "Which images are of the same patient is not known; every image counts as a group of its own."
        yield tag("li", said, class_="open")
    if evidence.leaks:
        said = f"Identical images in more than one split: {len(evidence.leaks)}"
        yield tag("li", tag("b", said), f" (SHA-256 of the pixels of {evidence.checked} images).", class_="bad")
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


def _features(evidence: Evidence) -> Iterator[Markup]:
    fingerprint, info = evidence.description.fingerprint, evidence.store
    yield tag("h2", "Encoder and store")
    if fingerprint is None:
        yield tag("p", "This model reads no features of an encoder.")
        return
    known = {key: text_of(fingerprint.fields[key]) for key in _IDENTITY if key in fingerprint.fields}
    rows = [(_IDENTITY[key], value) for key, value in known.items()]
    rows.append(("fingerprint of the features (SHA-256)", fingerprint.digest()))
    if info is not None:
        rows += [
            ("rows in the store", f"{info.rows}"),
            ("size on disk", size(info.bytes_on_disk)),
            ("version of the store (SHA-256 of its content)", info.version),
        ]
    yield table(["what", "value"], rows, caption="The frozen encoder, and where its features are kept", numeric=False)
    yield from (tag("p", note) for note in evidence.notes)


def _model(evidence: Evidence) -> Iterator[Markup]:
    model, training, metrics = evidence.description.model, evidence.description.training, evidence.description.metrics
    parameters, flops = metrics["parameters"], metrics["flops"]
    gates = ", ".join(f"{tap} on {stage}" for tap, stage in model.gates) or "none"
    rows = [
        ("backbone", f"{model.backbone}, first weights: {model.weights}"),
        ("image", f"{model.image_px} x {model.image_px} px"),
        ("gates (tap on stage)", gates),
        ("parameters", f"{parameters['backbone']:,} of the backbone, {parameters['slca']:,} of the gates"),
        ("operations", f"{flops['backbone'] / 1e9:.3g} G of the backbone, {flops['slca'] / 1e9:.3g} G of the gates"),
        ("training", ", ".join(f"{_RECIPE[key]} {text_of(training[key])}" for key in _RECIPE if key in training)),
        ("weights (SHA-256)", evidence.weights_sha256),
    ]
    yield tag("h2", "Model and training")
    yield table(["what", "value"], rows, caption="What was trained; all settings are at the end", numeric=False)


def _results(evidence: Evidence) -> Iterator[Markup]:
    figures = evidence.figures
    drawn = figures["bootstrap"]
    yield tag("h2", "Results")
    yield table(["score", "value", "95 % interval"], score_rows(figures), caption=f"Scores on {figures['split']}")
    yield tag(
        "p",
        f"Intervals: {drawn['resamples']:,} draws of the {drawn['groups']} groups with replacement (seed "
        f"{drawn['seed']}), so that images of one patient come and go together; for shares (accuracy, sensitivity, "
        f"specificity) exact ones at the number of images that the groups are worth.",
        class_="quiet",
    )
    head = ["class", "AUC", "average precision", "sensitivity", "specificity"]
    yield table(
        head, class_rows(figures), caption="Scores by class; the likeliest class, or a probability above .5, decides"
    )
    yield from point_tables(figures)


def _figures(evidence: Evidence) -> Iterator[Markup]:
    yield tag("h2", "Curves")
    drawn = [
        figures.roc(evidence),
        figures.precision_recall(evidence),
        figures.calibration(evidence),
        figures.confusion(evidence),
        figures.loss(evidence),
        figures.val_auc(evidence),
    ]
    yield tag("div", *drawn, class_="figures")


def _study(evidence: Evidence) -> Iterator[Markup]:
    study = evidence.study
    if study is None:
        return
    yield tag("h2", "Beside other runs")
    yield tag("p", f"The study {study.name}: the mean over seeds, and the paired difference to its baseline.")
    if not study.compares:
        yield tag("p", "It does not hold this run together with one that differs from it in the gates alone.")
    drawn = figures.efficiency(study)
    if drawn is not None:
        yield drawn
    yield study_table(study)


def _pictures(evidence: Evidence) -> Iterator[Markup]:
    pictures = evidence.pictures
    if pictures is None:
        return
    score = pictures.found["localisation"]
    yield tag("h2", "Where it looks")
    yield figures.sheet(pictures)
    if score is not None:
        yield localisation_table(score)


def _limits(evidence: Evidence) -> Iterator[Markup]:
    yield tag("h2", "What this result does not show")
    found = caveats(
        evidence.description,
        evidence.figures,
        evidence.data,
        generated=evidence.generated,
        untrained=evidence.untrained,
        compared=evidence.study is not None and evidence.study.compares,
        leaks=len(evidence.leaks),
    )
    yield tag("ul", *(tag("li", *_prose(sentence)) for sentence in found))


def _costs(evidence: Evidence) -> Iterator[Markup]:
    came = evidence.description.provenance
    yield tag("h2", "What it took")
    rows: list[tuple[str, str]] = []
    extraction = evidence.extraction
    if extraction is not None:
        encoded, seconds = extraction["encoded"], extraction["seconds"]
        rows.append(("stage one (features)", f"{span(seconds)} for {encoded} images on {extraction['device']}"))
    elif evidence.description.fingerprint is not None:
        rows.append(("stage one (features)", "not recorded"))
    seconds = sum(row["seconds"] for row in evidence.history)
    epochs, device = len(evidence.history), came.get("device", "a device that was not recorded")
    rows.append(("stage two (training)", f"{span(seconds)} for {epochs} epochs on {device}"))
    if evidence.store is not None:
        rows.append(("store", size(evidence.store.bytes_on_disk)))
    rows.append(("energy", "not measured"))
    yield table(["what", "cost"], rows, caption="Time, disk and energy", numeric=False)
    software = came.get("software", {})
    if software:
        yield table(["package", "version"], list(software.items()), caption="Versions in training", numeric=False)
    else:
        yield tag("p", "The versions that trained this model were not recorded.")


def _reproduce(evidence: Evidence) -> Iterator[Markup]:
    commands = evidence.commands
    if commands.lines or commands.why_none:
        yield tag("h2", "How to do it again")
    if commands.lines:
        yield tag("pre", tag("code", "\n".join(commands.lines)), tabindex="0")
    elif commands.why_none:
        yield tag("p", commands.why_none)
    citation = evidence.store.provenance.get("citation") if evidence.store is not None else None
    yield tag("h2", "Sources")
    known: list[Markup] = [
        tag("li", "SLCA, the gates: Gu and others, Adapting a Segmentation Foundation Model for Medical Image "
            "Classification, CBMS 2025, arXiv:2505.06217."),
        tag("li", "SAM, the encoder: Kirillov and others, Segment Anything, ICCV 2023."),
    ]  # fmt: skip
    if citation:
        licence = evidence.store.provenance.get("license", "unknown") if evidence.store is not None else "unknown"
        known.insert(0, tag("li", f"The data: {citation} Licence: {licence}."))
    yield tag("ul", *known)


def _settings(evidence: Evidence) -> Iterator[Markup]:
    description = evidence.description
    yield tag("h2", "All settings")
    gates = {key: getattr(description.model, key) for key in _GATE_OPTIONS} if description.model.gates else {}
    rows = [*field_rows({"gate": gates} if gates else {}), *field_rows(description.training)]
    yield table(["setting", "value"], rows, caption="Of the training", numeric=False)
    if description.fingerprint is not None:
        rows = field_rows(description.fingerprint.fields)
        yield table(["setting", "value"], rows, caption="Of the features: all that they depend on", numeric=False)
    if evidence.store is not None:
        info = evidence.store
        taps = {name: f"{t.channels} x {t.height} x {t.width} {t.dtype}" for name, t in info.taps.items()}
        rows = field_rows({"path": str(info.path), "format": f"{info.format} {info.format_version}", "tap": taps})
        caption = "Of the store, and how it came about"
        yield table(["what", "value"], [*rows, *field_rows(info.provenance)], caption=caption, numeric=False)


def _prose(text: str) -> list[Markup]:
    """Text with `code` in it."""
    return [tag("code", part) if number % 2 else escape(part) for number, part in enumerate(text.split("`"))]


def _listed(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
