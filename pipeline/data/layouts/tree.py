"""What is in a folder, on this machine or behind a URL."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from pipeline.errors import DataError
from pipeline.url import AnyPath, Url


class Tree(Protocol):
    """What is in a folder; names are relative to it, with forward slashes, and without what is hidden."""

    @property
    def root(self) -> AnyPath:
        """The folder."""

    @property
    def name(self) -> str:
        """Of the folder itself."""

    @property
    def listed(self) -> Mapping[str, str | None] | None:
        """Size and version of its files by name, where a server told them."""

    def directly(self, folder: str = "") -> tuple[list[str], list[str]]:
        """Folders and files directly in a folder."""

    def files(self, folder: str) -> Iterator[str]:
        """Files at any depth in a folder."""


class _Folder:
    """A folder of this machine."""

    listed = None

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            message = f"{root}: there is no such folder; expected class/image or split/class/image below it"
            raise DataError(message)
        self.root, self.name = root, root.resolve().name

    def directly(self, folder: str = "") -> tuple[list[str], list[str]]:
        """Folders and files directly in a folder.

        Raises:
            DataError: A folder is a link to one that it lies in.
        """
        folders, files = [], []
        for path in (self.root / folder).iterdir():
            if path.name.startswith("."):
                continue
            if path.is_dir():
                _refuse_loop(path)
                folders.append(path.relative_to(self.root).as_posix())
            else:
                files.append(path.name)
        return folders, files

    def files(self, folder: str) -> Iterator[str]:
        """Files at any depth in a folder; see `walk`."""
        for parent, files in walk(self.root / folder):
            below = Path(parent).relative_to(self.root).as_posix()
            yield from (f"{below}/{name}" for name in files)


class _Listing:
    """A folder behind a URL, as it was listed."""

    def __init__(self, root: Url, listed: Mapping[str, str | None]) -> None:
        self.root, self.name, self.listed = root, root.name, None if not root.can_list else listed
        self._folders: dict[str, set[str]] = defaultdict(set)
        self._files: dict[str, list[str]] = defaultdict(list)
        for name in listed:
            *parts, file = name.split("/")
            if any(part.startswith(".") or not part for part in (*parts, file)):
                continue
            for depth in range(len(parts)):
                self._folders["/".join(parts[:depth])].add("/".join(parts[: depth + 1]))
            self._files["/".join(parts)].append(file)

    def directly(self, folder: str = "") -> tuple[list[str], list[str]]:
        """Folders and files directly in a folder."""
        return list(self._folders.get(folder, ())), self._files.get(folder, [])

    def files(self, folder: str) -> Iterator[str]:
        """Files at any depth in a folder."""
        for name in self._files.get(folder, ()):
            yield f"{folder}/{name}"
        for below in self._folders.get(folder, ()):
            yield from self.files(below)


def tree_of(root: AnyPath) -> Tree:
    """Look into a folder.

    Raises:
        DataError: There is none.
        UnreachableError: The server behind a URL does not answer.
    """
    return _Listing(*root.files()) if isinstance(root, Url) else _Folder(root)


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders at any depth, this one first, each with the names of its files; both in order, and none that is hidden.

    Raises:
        DataError: A folder is a link to one that it lies in; other links are followed.
    """
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            _refuse_loop(Path(parent, name))
        yield parent, sorted(name for name in files if not name.startswith("."))


def _refuse_loop(folder: Path) -> None:
    """Refuse a link to a folder that it lies in, whose images would count twice.

    Raises:
        DataError: It is one.
    """
    if not folder.is_symlink():
        return
    target = os.path.realpath(folder)
    if any(Path(os.path.realpath(parent)).is_relative_to(target) for parent in folder.parents):
        message = f"{str(folder)!r} links to a folder that it lies in, so its images would count twice: remove it"
        raise DataError(message)
