"""Images that somebody names: files, folders of them, lists of them, URLs of either."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.data.image import SUFFIXES
from pipeline.data.layouts.tree import walk
from pipeline.errors import DataError
from pipeline.url import AnyPath, Url, any_path, join

LIST = ".txt"
Name = str | Url
"""Of an image: a path of this machine as text, which takes less memory than a `Path`, or a URL."""


def images_named(arguments: Sequence[str]) -> list[Name]:
    """Find all images that arguments stand for, in the order of the arguments.

    Args:
        arguments: Each an image file, there or not; a folder, of which all images at any depth are taken in the order
            of their paths, in linked folders too, but hidden ones; a text file (`.txt`) with an image a line, by its
            name below the folder that the list lies in, its path or its URL; or the URL of one of these.

    Raises:
        DataError: A folder holds no image, or a list cannot be read or names no image.
        UnreachableError: The server behind a URL does not answer.
    """
    return [name for argument in arguments for name in _below(any_path(argument))]


def _below(place: AnyPath) -> Iterator[Name]:
    found = False
    for name in _images(place):
        found = True
        yield name
    if not found:
        message = f"{place}: there is no image in it ({', '.join(SUFFIXES)}); name another folder or list"
        raise DataError(message)


def _images(place: AnyPath) -> Iterator[Name]:
    if place.suffix.lower() == LIST:
        return _listed(place)
    if place.suffix.lower() in SUFFIXES and not (isinstance(place, Path) and place.is_dir()):
        return iter((_name(place),))
    if isinstance(place, Url):
        root, files = place.files()
        return (root / name for name in sorted(files) if _is_image(name))
    return _in_folder(place) if place.is_dir() else iter((_name(place),))


def _in_folder(folder: Path) -> Iterator[str]:
    """Images at any depth below a folder, by their paths."""
    for parent, files in walk(folder):
        yield from (f"{parent}/{name}" for name in files if _is_image(name))


def _listed(file: AnyPath) -> Iterator[Name]:
    """Images of a list that is a file."""
    try:
        lines = file.read_bytes().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        message = f"{file}: the list cannot be read ({error}); expected a text file with an image a line"
        raise DataError(message) from error
    folder = file.parent
    yield from (_name(join(folder, line.strip())) for line in lines if line.strip())


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not any(part.startswith(".") for part in name.split("/"))


def _name(place: AnyPath) -> Name:
    return place if isinstance(place, Url) else str(place)
