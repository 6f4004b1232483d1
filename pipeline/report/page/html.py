"""HTML whose text is escaped by construction: what is not `Markup` already is text."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.errors import RunError

_PNG = b"\x89PNG\r\n\x1a\n"
_VOID = {"br", "img", "meta", "link"}  # elements that hold nothing and have no end tag


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Anything as HTML; what is `Markup` stays as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(str(text)))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """Build an element.

    Args:
        name: Of the element.
        children: `Markup`, or text that is escaped; None is left out.
        attributes: `class_` is written `class` and `aria_label` `aria-label`; None is left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(escape(child) for child in children if child is not None)
    return Markup(f"<{name}{written}>" if name in _VOID else f"<{name}{written}>{inner}</{name}>")


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, caption: str, numeric: bool = True) -> Markup:
    """Build a table that may be wider than the page: it scrolls by itself.

    Args:
        head: Names of the columns.
        rows: Cells; the first of each names the row.
        caption: What the table is; it stands above, outside of what scrolls.
        numeric: Align all columns but the first to the right.
    """
    top = tag("tr", *(tag("th", name, scope="col") for name in head))
    body = [tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows]
    kind = "numbers" if numeric else None
    content = tag("table", tag("thead", top), tag("tbody", *body), class_=kind, aria_label=caption)
    scrolled = tag("div", content, class_="scroll", role="region", tabindex="0", aria_label=caption)
    return tag("div", tag("p", caption, class_="caption"), scrolled)


def folded(title: str, *content: object, opened: bool = False) -> Markup:
    """Content that unfolds under its title."""
    return tag("details", tag("summary", title), *content, open="" if opened else None)


def prose(text: str) -> list[Markup]:
    """Text with `code` in it."""
    return [tag("code", part) if number % 2 else escape(part) for number, part in enumerate(text.split("`"))]


def listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def picture(path: Path, alt: str) -> Markup:
    """Inline a PNG file.

    Raises:
        RunError: It is something else, which is not to be sent along with a page.
    """
    content = path.read_bytes() if path.is_file() else b""
    if not content.startswith(_PNG):
        message = f"{path} is no PNG file, so the page does not show it: run the command that draws it again."
        raise RunError(message)
    encoded = base64.b64encode(content).decode("ascii")
    return tag("img", src=f"data:image/png;base64,{encoded}", alt=alt)
