"""Mask files among the images of a folder, told from them by a pattern that says how masks are named after images."""

from __future__ import annotations

import fnmatch
import posixpath
import re
from bisect import bisect_left
from collections.abc import Sequence

from pipeline.errors import ConfigError

STEM = "{stem}"
_WILD = re.compile(r"[*?\[]")


def masks_of(names: Sequence[str], pattern: str) -> dict[str, tuple[str, ...]]:
    """Tell masks from images, and find the masks of each image.

    Args:
        names: Files, as paths with forward slashes.
        pattern: How the masks of an image are called. `{stem}` is the image's name without its suffix, `*` any text and
            `?` any character; folders in front are relative to the image's own, as in `../masks/{stem}.png`. Capital
            and small letters behind `{stem}` are the same.

    Returns:
        The masks of each image, sorted. What is no key is a mask; an image without one has none.

    Raises:
        ConfigError: The pattern does not have `{stem}` once, behind the last `/`, with nothing wild in front of it.
    """
    folder, head, tail = _parts(pattern)
    ends = re.compile(fnmatch.translate(tail), re.IGNORECASE)
    ordered = sorted(names)
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        parent, file = posixpath.split(name)
        start = posixpath.normpath(posixpath.join(parent, folder, head + posixpath.splitext(file)[0]))
        masks = []
        at = bisect_left(ordered, start)
        while at < len(ordered) and ordered[at].startswith(start):
            rest = ordered[at][len(start) :]
            if "/" not in rest and ends.match(rest) and ordered[at] != name:
                masks.append(ordered[at])
            at += 1
        found[name] = tuple(masks)
    taken = {mask for masks in found.values() for mask in masks}
    return {name: masks for name, masks in found.items() if name not in taken}


def _parts(pattern: str) -> tuple[str, str, str]:
    """The folder of a pattern, and what stands in front of its stem and behind."""
    folder, name = posixpath.split(pattern)
    head, stem, tail = name.partition(STEM)
    if not stem or STEM in folder + tail or _WILD.search(folder + head):
        message = (
            f"data.masks: got {pattern!r}, expected {STEM} once in the file's name and `*` only behind it, such as "
            f"'{STEM}_mask*.png' for masks beside the images, or '../masks/{STEM}.png'"
        )
        raise ConfigError(message)
    return folder, head, tail
