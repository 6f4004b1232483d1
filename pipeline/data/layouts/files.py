"""Samples that are image files below one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.data.dataset import Image, Mask, listing
from pipeline.data.depth import DEFAULT_READING, Reading
from pipeline.data.image import read_image, read_mask, reading_rules
from pipeline.errors import DataError
from pipeline.url import AnyPath, Url, any_path, is_url, join


@dataclass(frozen=True)
class Files:
    """One image file per sample, and optionally mask files.

    Attributes:
        root: The folder.
        names: File of each sample, relative to `root`, with forward slashes; or a URL of its own.
        reading: How the files become uint8 RGB.
        masks: Mask files of each sample, named likewise; see `read_mask`. Empty if
            there are none.
        listed: Where `root` is a URL that was listed: size and version of its files by name.
    """

    root: AnyPath
    names: tuple[str, ...]
    reading: Reading = DEFAULT_READING
    masks: tuple[tuple[str, ...], ...] = ()
    listed: Mapping[str, str | None] | None = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[Files], tuple[Any, ...]]:
        """Leave the listing here: another process reads the files and does not ask what is new."""
        return Files, (self.root, self.names, self.reading, self.masks)

    @property
    def asks_for_stamps(self) -> bool:
        """Whether a server is asked for the stamp of each file, because its folder could not be listed."""
        return self.listed is None and (isinstance(self.root, Url) or any(map(is_url, self.names)))

    @property
    def all_elsewhere(self) -> bool:
        """Whether every file has a URL of its own, so that nothing lies in `root`."""
        return all(is_url(name) for name in (*self.names, *(name for files in self.masks for name in files)))

    def read(self, index: int) -> Image:
        """Pixels of a sample, uint8 (H, W, 3).

        Raises:
            DataError: The file cannot be read.
        """
        return read_image(join(self.root, self.names[index]), self.reading)

    def stamp(self, index: int) -> str | None:
        """Relative name, size, times (or a server's version) and reading rule; None where these are not to be had.

        The time of the last change of the file itself is among them, which nobody sets: archives and exports give many
        files one time of writing, and where formats do not compress, one size.
        """
        name = self.names[index]
        if isinstance(self.root, Url) or is_url(name):
            mark = self._mark(name)
            return mark and f"{join(self.root, name) if is_url(name) else name} {mark} {self._rules}"
        try:
            status = os.stat(f"{self._root}/{name}")  # noqa: PTH116  a Path costs more than the question itself
        except OSError:
            return None
        return f"{name} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {self._rules}"

    def _mark(self, name: str) -> str | None:
        """What a server says of a file's size and version."""
        if self.listed is not None and not is_url(name):
            return self.listed.get(name.removeprefix("./"))
        file = join(self.root, name)
        return file.mark() if isinstance(file, Url) else None

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
        merged = read_mask(join(self.root, files[0]))
        for name in files[1:]:
            other = read_mask(join(self.root, name))
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
        """Refuse names that leave the folder or are not there, listing them; what cannot be listed is taken as it is.

        Args:
            what: Where the names come from, for the message.

        Raises:
            DataError: Some file is missing, or a name is absolute or climbs out with `..`.
        """
        every = (*self.names, *(name for files in self.masks for name in files))
        everything = [name for name in every if not (is_url(name) and isinstance(any_path(name), Url))]
        outside = [name for name in everything if _leaves(name)]
        if outside:
            message = f"{what}: {len(outside)} paths leave {self.root}: {listing(outside)}; use paths relative to it"
            raise DataError(message)
        if isinstance(self.root, Url):
            missing = (
                []
                if self.listed is None
                else [name for name in everything if name.removeprefix("./") not in self.listed]
            )
        else:
            missing = [name for name in everything if not (self.root / name).is_file()]
        if missing:
            message = f"{what}: {len(missing)} of {len(everything)} files are not below {self.root}: {listing(missing)}"
            raise DataError(message)


def _leaves(name: str) -> bool:
    return name.startswith("/") or is_url(name) or ".." in name.split("/")
