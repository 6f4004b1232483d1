"""How the run was made: encoder and store, model and training, what it took, how to do it again, all settings."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.report.evidence import Evidence
from pipeline.report.page.html import Markup, folded, table, tag
from pipeline.report.page.tables import field_rows, size, span, text_of
from pipeline.train import run_folder
from pipeline.train.trained_model import Description

_GATE_OPTIONS = ("pool", "reduction", "norm", "mix", "identity_start")
_IDENTITY = {
    "encoder": "encoder",
    "weights_sha256": "weights of the encoder",
    "masks_sha256": "masks",
    "input_px": "side of the input, px",
    "taps": "taps",
    "pool": "pool, in tokens",
    "precision": "precision",
    "dtype": "type of the stored numbers",
}
_LEARNT = {
    "dice": "on generated images of its own: Dice from a point on the lesion",
    "recall": "lesions that it finds unasked, as a share",
    "zero_shot_auc": "on generated images of its own: AUC by the names of the classes alone",
}
_RECIPE = {
    "solver": "solver",
    "c": "C (inverse strength of the penalty)",
    "alpha": "alpha (weight of the cache)",
    "beta": "beta (how near a cached image must be)",
    "epochs": "epochs",
    "batch_size": "batch",
    "optimiser": "optimiser",
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "schedule": "schedule",
    "seed": "seed",
    "fraction": "share of the training set",
    "shots": "images of each class",
}


def encoder(evidence: Evidence) -> Iterator[Markup]:
    """The frozen encoder and where its features are kept."""
    fingerprint, info = evidence.description.fingerprint, evidence.store
    yield tag("h2", "Encoder and store", id="encoder")
    if fingerprint is None:
        yield tag("p", "This model reads no features of an encoder.")
        return
    known = {key: text_of(fingerprint.fields[key]) for key in _IDENTITY if key in fingerprint.fields}
    rows = [(_IDENTITY[key], value) for key, value in known.items() if not key.endswith("_sha256")]
    rows += [
        (what, f"{evidence.encoder_made[key]:.3f}") for key, what in _LEARNT.items() if key in evidence.encoder_made
    ]
    digests = [(_IDENTITY[key], value) for key, value in known.items() if key.endswith("_sha256")]
    digests.append(("fingerprint of the features", fingerprint.digest()))
    if info is not None:
        rows += [("rows in the store", f"{info.rows}"), ("size on disk", size(info.bytes_on_disk))]
        digests.append(("version of the store, of its content", info.version))
    yield table(["what", "value"], rows, caption="The frozen encoder, and where its features are kept", numeric=False)
    yield folded("Digests of encoder and store", _digests(digests))


def model(evidence: Evidence) -> Iterator[Markup]:
    """What was trained, and how."""
    model, training, metrics = evidence.description.model, evidence.description.training, evidence.description.metrics
    parameters, flops = metrics["parameters"], metrics["flops"]
    gates = ", ".join(f"{tap} on {stage}" for tap, stage in model.gates) or "none"
    rows = [
        ("backbone", f"{model.backbone}, first weights: {model.weights}" if model.reads_images else "none"),
        ("image", f"{model.image_px} x {model.image_px} px" if model.reads_images else "not looked at"),
        ("gates (tap on stage)", gates),
        *([("pooled features (taps)", ", ".join(model.fuse))] if model.fuse else []),
        *_of_clip(evidence.description),
        *([("painted over the image", model.overlay.in_words)] if model.overlay else []),
        *_unmasked(evidence),
        ("parameters", f"{parameters['backbone']:,} of the backbone, {parameters['slca']:,} of the gates"),
        ("operations", f"{flops['backbone'] / 1e9:.3g} G of the backbone, {flops['slca'] / 1e9:.3g} G of the gates"),
        (
            "training",
            ", ".join(f"{_RECIPE[key]} {text_of(training[key])}" for key in _RECIPE if training.get(key) is not None),
        ),
    ]
    yield tag("h2", "Model and training", id="model")
    yield table(["what", "value"], rows, caption="What was trained; all settings are further down", numeric=False)
    yield folded("Digest of the model", _digests([("weights of the model", evidence.weights_sha256)]))


def _of_clip(description: Description) -> Iterator[tuple[str, str]]:
    """What a CLIP was asked, and what of it was trained besides the image tower."""
    if description.clip is None:
        return
    for name, texts in description.clip["prompts"].items():
        yield f"prompts of {name}", "; ".join(texts)
    rate, share = description.training["text_lr"], description.training["alignment"]
    yield "text tower", f"trained at {rate:g} times the learning rate" if rate else "as it started"
    yield "share of image-text alignment", text_of(0.5 if share is None else share)
    rank = 0 if description.model.clip is None else description.model.clip.lora
    if rank:
        yield "image tower", f"as it started, with adapters of rank {rank}, which are added to its weights"


def _unmasked(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """How many images no mask was painted on, in each split where that was counted."""
    test = {evidence.figures["split"]: evidence.figures["overlay"]} if evidence.figures.get("overlay") else {}
    counted = {**evidence.description.metrics.get("overlay", {}), **test}
    told = [f"{of['without_masks']} of {of['images']} in {split}" for split, of in counted.items() if of]
    if told:
        yield "images without any mask, which are taken as they are", ", ".join(told)


def costs(evidence: Evidence) -> Iterator[Markup]:
    """Time, disk, energy, and the versions that computed it."""
    came = evidence.description.provenance
    yield tag("h2", "What it took", id="costs")
    rows: list[tuple[str, str]] = []
    extraction = evidence.extraction
    if extraction is not None:
        encoded, seconds = extraction["encoded"], extraction["seconds"]
        rows.append(("stage one (features)", f"{span(seconds)} for {encoded} images on {extraction['device']}"))
    elif evidence.description.fingerprint is not None:
        rows.append(("stage one (features)", "not recorded"))
    seconds = sum(row["seconds"] for row in evidence.history)
    epochs, device = len(evidence.history), came.get("device", "a device that was not recorded")
    _, steps, _ = run_folder.steps_of(evidence.history, evidence.figures["best_epoch"])
    rows.append(("stage two (training)", f"{span(seconds)} for {epochs} {steps} on {device}"))
    if evidence.store is not None:
        rows.append(("store", size(evidence.store.bytes_on_disk)))
    rows.append(("energy", "not measured"))
    yield table(["what", "cost"], rows, caption="Time, disk and energy", numeric=False)
    software = came.get("software", {})
    if software:
        versions = table(["package", "version"], list(software.items()), caption="In training", numeric=False)
        yield folded("Versions of the software", versions)
    else:
        yield tag("p", "The versions that trained this model were not recorded.")


def reproduce(evidence: Evidence) -> Iterator[Markup]:
    """The commands, and the sources."""
    commands = evidence.commands
    if commands.lines or commands.why_none:
        yield tag("h2", "How to do it again", id="again")
    if commands.lines:
        yield tag("pre", tag("code", "\n".join(commands.lines)), tabindex="0")
    elif commands.why_none:
        yield tag("p", commands.why_none)
    citation = evidence.store.provenance.get("citation") if evidence.store is not None else None
    yield tag("h2", "Sources", id="sources")
    known: list[Markup] = [
        tag("li", "SLCA, the gates: Gu and others, Adapting a Segmentation Foundation Model for Medical Image "
            "Classification, CBMS 2025, arXiv:2505.06217."),
        tag("li", "SAM, the encoder: Kirillov and others, Segment Anything, ICCV 2023."),
        tag("li", "Decision curves: Vickers and Elkin, Medical Decision Making 26 (2006), 565-574."),
    ]  # fmt: skip
    if citation:
        licence = evidence.store.provenance.get("license", "unknown") if evidence.store is not None else "unknown"
        known.insert(0, tag("li", f"The data: {citation} Licence: {licence}."))
    yield tag("ul", *known)


def settings(evidence: Evidence) -> Iterator[Markup]:
    """Everything that the numbers depend on, folded."""
    description = evidence.description
    yield tag("h2", "All settings", id="settings")
    gates = {key: getattr(description.model, key) for key in _GATE_OPTIONS} if description.model.gates else {}
    rows = [*field_rows({"gate": gates} if gates else {}), *field_rows(description.training)]
    yield folded("Settings of the training", table(["setting", "value"], rows, caption="As used", numeric=False))
    if description.fingerprint is not None:
        rows = field_rows(description.fingerprint.fields)
        listed = table(["setting", "value"], rows, caption="All that the features depend on", numeric=False)
        yield folded("Settings of the features", listed)
    if evidence.store is not None:
        info = evidence.store
        taps = {name: f"{t.channels} x {t.height} x {t.width} {t.dtype}" for name, t in info.taps.items()}
        rows = field_rows({"path": str(info.path), "format": f"{info.format} {info.format_version}", "tap": taps})
        listed = table(
            ["what", "value"], [*rows, *field_rows(info.provenance)], caption="How it came about", numeric=False
        )
        yield folded("The store", listed)


def _digests(rows: list[tuple[str, str]]) -> Markup:
    """A table of digests, in letters of one width."""
    cells = [(name, tag("code", value)) for name, value in rows]
    return table(["of what", "SHA-256"], cells, caption="To tell this from any other", numeric=False)
