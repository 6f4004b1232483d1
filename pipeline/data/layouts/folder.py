"""Image folders: `root/class/image`, or `root/split/class/image` with splits of one's own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from pipeline.data.dataset import SPLITS, Dataset, Draw, Sample, Split, listing
from pipeline.data.depth import DEFAULT_READING, Reading
from pipeline.data.image import SUFFIXES
from pipeline.data.layouts.files import Files
from pipeline.data.layouts.mask_files import STEM, masks_of
from pipeline.data.layouts.tree import Tree, tree_of
from pipeline.data.splits import FRACTIONS, settle_splits, split_named
from pipeline.errors import DataError
from pipeline.url import AnyPath


def load_folder(
    root: AnyPath,
    *,
    group_pattern: str | None = None,
    masks: str | None = None,
    skip: Sequence[str] = (),
    fractions: Mapping[Split, float] = FRACTIONS,
    seed: int = 0,
    draw: Draw | None = "steady",
    reading: Reading = DEFAULT_READING,
) -> Dataset:
    """Load a folder of classes, in which an id is a file's path relative to `root`.

    Where the folders directly below `root` are called train, val (or valid, validation) and test, they are the
    splits; else they are the classes and the splits are drawn. Where they are train and test alone, val is drawn from
    train. Classes are numbered in the order of their names. Images may lie at any depth below their class. Hidden files
    are passed over; files of other kinds, those to skip, and what lies beside the folders of the classes, are passed
    over and counted.

    Args:
        root: The folder; or its URL, which over plain http is that of a list of its files (see `Url.files`).
        group_pattern: Regular expression searched in each file's name; its first parenthesis, or else the whole
            match, names the group. None: every image is a group.
        masks: How the mask files of an image are called, such as `{stem}_mask*.png`; see `mask_files`. They are never
            taken for images.
        skip: Patterns of files that are no images of this data set, such as `*_overlay.png`, for the file's name or
            for its path below `root`.
        fractions: Shares of val and test where the splits are drawn; where only val is, a share of train.
        seed: Of the drawn splits.
        draw: How they are drawn, see `pipeline.data.splits`; None makes everything test.
        reading: How the files become uint8 RGB.

    Raises:
        ConfigError: `masks` is no such pattern.
        UnreachableError: The server behind a URL does not answer.
        DataError: `root` is not such a folder, a class is empty, no image has a mask although `masks` is given, a name
            does not match `group_pattern`, or the result is no valid `Dataset` (a group in two splits, for one).
    """
    tree = tree_of(root)
    ignored: Counter[str] = Counter()
    names: list[str] = []
    classes: list[str] = []
    own: list[Split] = []
    found: list[tuple[str, ...]] = []
    for split, folder in _class_folders(tree, ignored):
        images = _images_and_masks(tree, folder, masks, skip, ignored)
        if not images:
            message = (
                f"{tree.root / folder}: the class has no image ({', '.join(SUFFIXES)}); add some or remove the folder"
            )
            raise DataError(message)
        names += images
        found += images.values()
        classes += [_last(folder)] * len(images)
        own += [split] * len(images) if split else []
    if masks is not None and names and not any(found):
        message = f"{root}: no image has a mask by the pattern {masks!r} (data.masks); {_example(names, masks)}"
        raise DataError(message)
    groups = _groups(root, names, group_pattern)
    class_names = tuple(sorted(set(classes)))
    labels = [class_names.index(name) for name in classes]
    settled = settle_splits(
        own, labels, groups, class_names, draw=draw, fractions=fractions, seed=seed, where=str(root)
    )
    return Dataset(
        tree.name,
        tuple(map(Sample, names, labels, settled.splits, groups)),
        class_names,
        "binary" if len(class_names) == 2 else "multiclass",
        Files(tree.root, tuple(names), reading, tuple(found) if any(found) else (), tree.listed),
        dict(ignored),
        drawn=settled.drawn,
        val_drawn=settled.val_drawn,
    )


def _example(names: Sequence[str], masks: str) -> str:
    """What a pattern of masks was looked for beside the first image, for a message."""
    stem = names[0].rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return f"beside {names[0]!r} it would be {masks.replace(STEM, stem)!r}: mend it, or leave it out"


def _images_and_masks(
    tree: Tree, folder: str, masks: str | None, skip: Sequence[str], ignored: Counter[str]
) -> dict[str, tuple[str, ...]]:
    """Images of a class in the order of their names, and the masks of each."""
    files = []
    for name in sorted(tree.files(folder)):
        if not name.lower().endswith(SUFFIXES) or any(
            fnmatchcase(name, pattern) or fnmatchcase(_last(name), pattern) for pattern in skip
        ):
            ignored[_suffix(name)] += 1
        else:
            files.append(name)
    return dict.fromkeys(files, ()) if masks is None else masks_of(files, masks)


def _class_folders(tree: Tree, ignored: Counter[str]) -> list[tuple[Split | None, str]]:
    """Folders of the classes with their split, in a fixed order; the split is None where it has to be drawn."""
    below = _folders(tree, "", ignored)
    found = {folder: split_named(folder) for folder in below}
    if not any(found.values()):
        return [(None, folder) for folder in below]
    others = [folder for folder, split in found.items() if split is None]
    if others:
        message = (
            f"{tree.root}: beside splits there are other folders: {listing(others)}; use names of splits or of classes"
        )
        raise DataError(message)
    return [
        (split, folder)
        for split in SPLITS
        for top in below
        if found[top] == split
        for folder in _folders(tree, top, ignored)
    ]


def _folders(tree: Tree, folder: str, ignored: Counter[str]) -> list[str]:
    """Folders directly below one, and a count of the files there, by suffix."""
    folders, files = tree.directly(folder)
    ignored.update(map(_suffix, files))
    return sorted(folders)


def _last(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _suffix(name: str) -> str:
    """What a count of files calls a kind of them."""
    return Path(name).suffix.lower() or "no suffix"


def _groups(root: AnyPath, names: list[str], pattern: str | None) -> list[str]:
    """Group of every image, by the pattern on the file name."""
    if pattern is None:
        return names
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        message = f"the group pattern {pattern!r} is no regular expression ({error}); mend data.group_pattern"
        raise DataError(message) from None
    matches = [compiled.search(name.rsplit("/", 1)[-1]) for name in names]
    found = [match and match[1 if compiled.groups else 0] for match in matches]
    unmatched = [name for name, group in zip(names, found, strict=True) if group is None]
    if unmatched:
        message = f"{root}: the group pattern {pattern!r} does not match {len(unmatched)} names: {listing(unmatched)}"
        raise DataError(message)
    return [group for group in found if group is not None]
