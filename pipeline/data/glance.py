"""A glance at image files, evenly chosen: sizes, kinds of pixels, pages, and what cannot be opened. Reads headers."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from pipeline.data import dicom
from pipeline.data.image import FORMATS

LOOKED_AT = 64
_DECODED = 4  # of images with more than 8 bits, to see which part of their range they use
_KINDS = {
    "1": "1 bit",
    "L": "grey, 8 bit",
    "LA": "grey with alpha",
    "P": "palette",
    "RGB": "RGB",
    "RGBA": "RGB with alpha",
    "CMYK": "CMYK",
    "I": "grey, 32 bit",
    "F": "grey, floating point",
}


@dataclass(frozen=True)
class Glance:
    """What the headers of some files say.

    Attributes:
        looked_at: How many files these were.
        smallest: Width and height of the one with the shortest side, px; None where only DICOM files were seen.
        median_side: Median of the shorter sides, px.
        largest: Width and height of the one with the longest side, px.
        kinds: Files by kind of pixels, in words.
        pages: Files that have several pages, and the most that one has; 0 and 1 where there are none.
        unreadable: Those that are no images, by path, with the reason.
        deep_max: Largest value seen in images of more than 8 bits; None where there are none.
    """

    looked_at: int
    smallest: tuple[int, int] | None
    median_side: int | None
    largest: tuple[int, int] | None
    kinds: Mapping[str, int]
    pages: tuple[int, int]
    unreadable: Mapping[str, str]
    deep_max: float | None


def glance(files: Sequence[Path], at_most: int = LOOKED_AT) -> Glance:
    """Open some of the files, from the first to the last, without decoding more than a few.

    Args:
        files: Image files.
        at_most: How many of them to open.
    """
    chosen = files if len(files) <= at_most else [files[i * len(files) // at_most] for i in range(at_most)]
    sizes: list[tuple[int, int]] = []
    kinds: Counter[str] = Counter()
    paged, most_pages = 0, 1
    unreadable: dict[str, str] = {}
    deep: list[float] = []
    for path in chosen:
        try:
            with path.open("rb") as stream:
                if dicom.is_dicom(stream):
                    kinds["DICOM"] += 1
                    continue
                with Pillow.open(stream, formats=FORMATS) as image:
                    sizes.append(image.size)
                    kinds[_KINDS.get(image.mode, "grey, 16 bit" if image.mode.startswith("I;16") else image.mode)] += 1
                    pages = int(getattr(image, "n_frames", 1))
                    paged, most_pages = paged + (pages > 1), max(most_pages, pages)
                    if image.mode[0] in "IF" and len(deep) < _DECODED:
                        deep.append(float(np.asarray(image).max()))
        except (OSError, ValueError, SyntaxError, EOFError, Pillow.DecompressionBombError) as error:
            unreadable[str(path)] = (str(error) or type(error).__name__).splitlines()[0]
    return Glance(
        looked_at=len(chosen),
        smallest=min(sizes, key=min, default=None),
        median_side=int(statistics.median(map(min, sizes))) if sizes else None,
        largest=max(sizes, key=max, default=None),
        kinds=dict(kinds),
        pages=(paged, most_pages),
        unreadable=unreadable,
        deep_max=max(deep, default=None),
    )
