"""Samples that are image files below one folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.data.dataset import Image, Mask, listing
from pipeline.data.depth import DEFAULT_READING, Reading
from pipeline.data.image import read_image, reading_rules
from pipeline.errors import DataError


@dataclass(frozen=True)
class Files:
    """One image file per sample, and optionally mask files.

    Attributes:
        root: The folder.
        names: File of each sample, relative to `root`, with forward slashes.
        reading: How the files become uint8 RGB.
        masks: Mask files of each sample, relative to `root`; what is not zero in one of them is the finding. Empty if
            there are none.
    """

    root: Path
    names: tuple[str, ...]
    reading: Reading = DEFAULT_READING
    masks: tuple[tuple[str, ...], ...] = ()

    def read(self, index: int) -> Image:
        """Pixels of a sample, uint8 (H, W, 3).

        Raises:
            DataError: The file cannot be read.
        """
        return read_image(self.root / self.names[index], self.reading)

    def stamp(self, index: int) -> str | None:
        """Relative name, size, time and reading rule; None for a file that is not there."""
        name = self.names[index]
        try:
            status = os.stat(f"{self._root}/{name}")  # noqa: PTH116  a Path costs more than the question itself
        except OSError:
            return None
        return f"{name} {status.st_size} {status.st_mtime_ns} {self._rules}"

    @cached_property
    def _root(self) -> str:
        return str(self.root)

    @cached_property
    def _rules(self) -> str:
        return json.dumps(reading_rules(self.reading))

    def mask(self, index: int) -> Mask | None:
        """Where the finding is, bool (H, W): in any of the sample's mask files; None where it has none.

        Raises:
            DataError: A mask file cannot be read, or those of a sample differ in size.
        """
        files = self.masks[index] if self.masks else ()
        if not files:
            return None
        merged: Mask = read_image(self.root / files[0])[:, :, 0] > 0
        for name in files[1:]:
            other = read_image(self.root / name)[:, :, 0] > 0
            if other.shape != merged.shape:
                sizes = " and ".join(f"{h} x {w}" for h, w in (merged.shape, other.shape))
                message = (
                    f"{self.root}: the masks {files[0]!r} and {name!r} are of one image and differ in size, {sizes} "
                    f"(height x width); draw both on the image's own pixels"
                )
                raise DataError(message)
            merged |= other
        return merged

    def check(self, what: str) -> None:
        """Refuse names that leave the folder or are not there, listing them.

        Args:
            what: Where the names come from, for the message.

        Raises:
            DataError: Some file is missing, or a name is absolute or climbs out with `..`.
        """
        everything = [*self.names, *(name for files in self.masks for name in files)]
        outside = [name for name in everything if _leaves(name)]
        if outside:
            message = f"{what}: {len(outside)} paths leave {self.root}: {listing(outside)}; use paths relative to it"
            raise DataError(message)
        missing = [name for name in everything if not (self.root / name).is_file()]
        if missing:
            message = f"{what}: {len(missing)} of {len(everything)} files are not below {self.root}: {listing(missing)}"
            raise DataError(message)


def _leaves(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/")
