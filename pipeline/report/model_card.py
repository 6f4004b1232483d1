"""The card of a model that is handed on: data, intended use, figures with intervals, limits, licence, in Markdown."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.report.page.tables import SCORES, interval, with_interval
from pipeline.report.verdict import Units
from pipeline.train.trained_model import Description

_USE = """It is meant for research: to repeat the figures below, to compare with them, and to try the model on images of
the same kind. It is not meant for any decision about a patient. Before any other use, score it on images of your own
with known labels (`pipeline evaluate`), and choose thresholds there."""

_OF_METHODS = """- SLCA, the gates: Gu and others, Adapting a Segmentation Foundation Model for Medical Image
  Classification, CBMS 2025, arXiv:2505.06217
- SAM, the frozen encoder: Kirillov and others, Segment Anything, ICCV 2023"""


def render_card(
    description: Description,
    figures: Mapping[str, Any],
    facts: Mapping[str, Any],
    limits: Sequence[str],
    *,
    license_name: str,
    citation: str,
    onnx: Mapping[str, Any] | None = None,
) -> str:
    """The text of `README.md`.

    Args:
        description: The model.
        figures: What `evaluate` found.
        facts: About the data, see `provenance.data_in_numbers`.
        limits: What the figures do not show.
        license_name: Of the data.
        citation: Of the data.
        onnx: What `write_onnx` told; None where there is no such file.
    """
    model = description.model
    fields = description.fingerprint.fields if description.fingerprint is not None else {}
    front = {
        "license": license_name,
        "library_name": "slca-pipeline",
        "tags": ["image-classification", "medical"],
        "data_set": facts["name"],
        "auc": round(figures["auc"], 4),
    }
    gates = ", ".join(f"`{tap}` on `{stage}`" for tap, stage in model.gates) or "none"
    what = f"A `{model.backbone}`" if model.reads_images else "A linear classifier of pooled features"
    built = f"{what} that tells {_names(description.class_names)} apart. Gates: {gates}."
    if model.fuse:
        built += f" Pooled features that its last layer reads: {', '.join(f'`{tap}`' for tap in model.fuse)}."
    if description.clip is not None:
        built += _prompts(description)
    if model.overlay:
        built += f" Painted over its images: {model.overlay.in_words}."
    if figures["positive"] is not None:
        built += f" The class that is looked for: *{_text(figures['positive'])}*."
    if fields:
        built += f" It reads features of the frozen encoder `{fields['encoder']}`, which is not in this folder."
    parts = [
        "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---"]),
        f"# A classifier of {_text(facts['name'])}",
        built,
        "## Data",
        _data(description, facts),
        "## Intended use",
        _USE,
        f"## Figures on {Units(facts['grouped']).count(figures['n'], figures['bootstrap']['groups'])} of the "
        f"{figures['split']} set",
        _figures(figures),
        "## What the figures do not show",
        "\n".join(f"- {sentence}" for sentence in limits),
        "## How to use it",
        _how(fields, onnx),
        "## Licence",
        f"The data: {_text(license_name)}. The weights were learned from these data; whether and how they may be "
        "handed on is for that licence to say. The code is under Apache-2.0.",
        "## Citation",
        f"- The data: {_text(citation)}\n{_OF_METHODS}" if citation else _OF_METHODS,
    ]
    return "\n\n".join(parts) + "\n"


def _prompts(description: Description) -> str:
    """What CLIP's weights were, and what its text tower was asked."""
    assert description.clip is not None
    asked = "; ".join(
        f"*{_text(name)}*: {', '.join(f'“{_text(text)}”' for text in texts)}"
        for name, texts in description.clip["prompts"].items()
    )
    first = "drawn from a seed" if description.model.weights == "none" else f"`{description.model.weights}`"
    return (
        f" Its first weights were {first}. Its head compares the image with the prompts of the classes ({asked}), "
        f"whose embeddings are in this folder; no text tower is needed."
    )


def _data(description: Description, facts: Mapping[str, Any]) -> str:
    names = description.class_names
    rows = [
        [split, found["samples"], found["groups"], *(found["classes"][name] for name in names)]
        for split, found in facts["splits"].items()
    ]
    grouped = "A group is a patient." if facts["grouped"] else "Patients are not known: each image is its own group."
    return f"{_table(['split', 'images', 'groups', *names], rows)}\n\n{grouped} The task is {description.task}."


def _figures(figures: Mapping[str, Any]) -> str:
    ends = figures["intervals"]
    scores = [[SCORES[key], f"{figures[key]:.3f}", interval(ends[key])] for key in SCORES if key in figures]
    keys = ("class_auc", "class_ap", "sensitivity", "specificity")
    by_class = [
        [name, *(with_interval(figures[key][name], ends[key][name]) for key in keys)] for name in figures["class_auc"]
    ]
    drawn = figures["bootstrap"]
    return "\n\n".join(
        (
            _table(["score", "value", "95 % interval"], scores),
            _table(["class", "AUC", "average precision", "sensitivity", "specificity"], by_class),
            f"Intervals by {drawn['resamples']} draws of groups with replacement, seed {drawn['seed']}; those of "
            "accuracy, sensitivity and specificity are exact, at the number of images that the groups are worth. "
            "Thresholds chosen on val, and what they give, are in `metrics.json`.",
        )
    )


def _how(fields: Mapping[str, Any], onnx: Mapping[str, Any] | None) -> str:
    weights = " --checkpoint ENCODER.pth" if fields else ""
    lines = [
        f"With the package `slca-pipeline` installed:\n\n```\npython predict.py IMAGE...{weights}\n"
        f"pipeline predict --model .{weights} IMAGE...   # the same\n```"
    ]
    if fields:
        lines.append(
            f"`ENCODER.pth` is the file of `{fields['encoder']}` weights with the SHA-256 "
            f"`{fields['weights_sha256']}`. Another file is refused."
        )
    if onnx is not None:
        shapes = ", ".join(f"`{name}` {tuple(shape)}".replace("'", "") for name, shape in onnx["inputs"].items())
        lines.append(
            f"`model.onnx` (operator set {onnx['opset']}) takes {shapes}, float32, and gives `probabilities`; images "
            "are RGB in 0 to 255, resized as `preprocessing.json` says. It was checked against torch: probabilities "
            f"differ by at most {onnx['largest_difference']:.0e}."
        )
    lines.append(
        "`model.safetensors` holds the weights, `model.json` what to build around them and the fingerprint of the "
        "features, `config.json` how the run was configured, `classes.json` the class names, `preprocessing.json` what "
        "happens to an image first."
    )
    return "\n\n".join(lines)


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_text(item) for item in line)} |" for line in lines)


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"*{_text(name)}*" for name in names)


def _text(value: object) -> str:
    """Text that Markdown takes as it is: class names and citations come from files."""
    return html.escape(str(value), quote=False).replace("|", "\\|").replace("\n", " ")
