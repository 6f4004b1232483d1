"""One page to send: a single HTML file that asks nothing of the network, runs no script, and reads well on paper too.

The same evidence gives the same bytes; the date on the page is that of the signature.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from pipeline import records
from pipeline.report.evidence import Evidence
from pipeline.report.page import checklists, making, patients, results
from pipeline.report.page.html import Markup, tag
from pipeline.report.page.summary import summary

FILE = "report.html"
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_SECTIONS = (
    patients.patients,
    results.results,
    results.decisions,
    results.subgroups,
    results.elsewhere,
    results.curves,
    results.pictures,
    results.beside_others,
    results.limits,
    making.encoder,
    making.model,
    making.costs,
    making.reproduce,
    making.settings,
    checklists.checklists,
)
_HEADING = re.compile(r'<h2 id="([^"]+)">(.*?)</h2>')


def write(folder: Path, evidence: Evidence) -> Path:
    """Write the page into the folder of the run."""
    with records.replacing(folder / FILE) as file:
        file.write(render(evidence).encode())
    return folder / FILE


def render(evidence: Evidence) -> str:
    """Build the page."""
    first = [Markup(f"\n{part}") for part in summary(evidence)]
    rest = [Markup(f"\n{part}") for section in _SECTIONS for part in section(evidence)]
    style = files("pipeline.report.page").joinpath("page.css").read_text(encoding="utf-8")
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
    main = tag(
        "main",
        tag("section", *first, "\n", id="summary", aria_label="Summary"),
        "\n",
        _contents(rest),
        "\n",
        tag("div", *rest, "\n", class_="rest"),
    )
    return f"<!doctype html>\n{tag('html', chr(10), head, chr(10), tag('body', main), lang='en')}\n"


def _contents(parts: list[Markup]) -> Markup:
    """Links to the sections, from their headings."""
    found = [
        ("summary", Markup("Summary")),
        *((place, Markup(title)) for place, title in _HEADING.findall("".join(parts))),
    ]
    links = [tag("li", tag("a", title, href=f"#{place}")) for place, title in found]
    return tag("nav", tag("p", "Contents", class_="caption"), tag("ul", *links), aria_label="Contents")
