"""One description of a data set: ordered samples with label, split and group, and a way to read their pixels."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError

Split = Literal["train", "val", "test"]
Task = Literal["multiclass", "binary", "ordinal", "multilabel"]
Draw = Literal["steady", "balanced"]  # how splits are drawn; see `pipeline.data.splits`
Label = int | tuple[int, ...]
Image = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

SPLITS: tuple[Split, ...] = get_args(Split)
LISTED = 10  # names that a message spells out before it says how many more there are


class Source(Protocol):
    """Where the pixels of a data set are; one for image files, one for arrays. Called from several threads at once."""

    def read(self, index: int) -> Image:
        """Pixels of a sample, uint8 (H, W, 3)."""

    def stamp(self, index: int) -> str | None:
        """What changes when the stored image changes, found without decoding it."""

    def mask(self, index: int) -> Mask | None:
        """Where the finding is, bool (H, W), or None where that is not known."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its label.

    Attributes:
        id: Name of the sample, unique in its data set and stable between runs.
        label: Class number; for a multilabel task one 0 or 1 per class.
        split: The part of the data set it belongs to.
        group: What must not straddle splits, such as the patient; the id itself where nothing is known.
        subgroups: What else is known of it, such as sex or site: one text for each of the data set's `subgroup_names`.
    """

    id: str
    label: Label
    split: Split
    group: str
    subgroups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Samples in a fixed order and the pixels behind them; what it holds has been checked.

    Attributes:
        name: For titles and messages; no path, because it is stored.
        samples: In the order of every array about this data set.
        class_names: By class number.
        task: What the labels mean; an ordinal task has its classes in ascending order.
        source: Where the pixels are.
        ignored: How many files lie there and are no sample, by suffix.
        positive: The class that is looked for; None leaves it to `positive_class`.
        subgroup_names: What is known of each sample besides its label, for scores by subgroup.
        drawn: How the splits were drawn; None where the data set has its own.
        val_drawn: Whether val was drawn from the train that the data set comes with.

    Raises:
        DataError: An id is empty, repeated or holds control characters, a label does not fit the task, a group is in
            two splits, a class is empty, train has samples but none of some class, or the positive class is none.
    """

    name: str
    samples: tuple[Sample, ...]
    class_names: tuple[str, ...]
    task: Task
    source: Source = field(repr=False, compare=False)
    ignored: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)
    positive: str | None = None
    subgroup_names: tuple[str, ...] = ()
    drawn: Draw | None = field(default=None, compare=False)
    val_drawn: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        _check_positive(self.name, self.positive, self.class_names)
        _check_ids(self.name, self.samples)
        _check_labels(self.name, self.samples, self.class_names, self.task)
        _check_groups(self.name, self.samples)
        _check_classes(self.name, self.samples, self.class_names)

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> Image:
        """Pixels of a sample, uint8 (H, W, 3); safe to call from several threads.

        Raises:
            DataError: The image cannot be read; the message names the file and the reason.
        """
        return self.source.read(index)

    def stamp(self, index: int) -> str | None:
        """Cheap identity of a sample's source (relative name, size, time, reading rule); None if there is none."""
        return self.source.stamp(index)

    def recorded_digest(self, index: int) -> bytes | None:
        """Digest of the pixels behind a sample, where its source knows it without reading them, as a store does."""
        recorded: Callable[[int], bytes | None] | None = getattr(self.source, "digest", None)
        return None if recorded is None else recorded(index)

    @property
    def asks_for_stamps(self) -> bool:
        """Whether each stamp is an answer that a server takes its time for."""
        return bool(getattr(self.source, "asks_for_stamps", False))

    def mask(self, index: int) -> Mask | None:
        """Where the finding is, bool (H, W), or None where the data set does not know."""
        return self.source.mask(index)

    def indices(self, split: Split) -> list[int]:
        """Positions of a split's samples, ascending."""
        return [i for i, sample in enumerate(self.samples) if sample.split == split]

    @property
    def positive_class(self) -> int | None:
        """Number of the class that sensitivity and predictive values speak of first: the named one, of two the last.

        None where there are more and none is named. It decides which figures stand in front and changes no order of
        classes, no decision and no training.
        """
        if self.positive is not None:
            return self.class_names.index(self.positive)
        return len(self.class_names) - 1 if self.task == "binary" or len(self.class_names) == 1 else None

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Labels of all samples, int64 (n,); (n, classes) of 0 and 1 for a multilabel task."""
        return np.array([sample.label for sample in self.samples], np.int64)


def identical_across_splits(dataset: Dataset, digests: npt.NDArray[np.uint8]) -> tuple[tuple[str, ...], ...]:
    """Samples with the same pixels that lie in different splits: each a leak from train to test or val.

    Args:
        dataset: The samples.
        digests: `pixel_digest` of every sample, uint8 (n, 32); zeros where an image could not be read.

    Returns:
        The ids of each set of equal images that spans splits, in the order of the samples.
    """
    by_digest: dict[bytes, list[int]] = defaultdict(list)
    for index in np.flatnonzero(digests.any(axis=1)).tolist():
        by_digest[digests[index].tobytes()].append(index)
    samples = dataset.samples
    return tuple(
        tuple(samples[i].id for i in same) for same in by_digest.values() if len({samples[i].split for i in same}) > 1
    )


def listing(names: Iterable[str]) -> str:
    """Names for a message: quoted, at most `LISTED` of them, and how many more there are."""
    everything = list(names)
    shown = ", ".join(repr(name) for name in everything[:LISTED])
    more = len(everything) - LISTED
    return f"{shown} and {more} more" if more > 0 else shown


def positives(label: Label) -> Sequence[int]:
    """Class numbers that a label says are present."""
    return (label,) if isinstance(label, int) else [k for k, present in enumerate(label) if present]


def _check_positive(name: str, positive: str | None, class_names: Sequence[str]) -> None:
    if positive is None or positive in class_names:
        return
    near = difflib.get_close_matches(positive, class_names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"name one of {listing(class_names)}"
    message = f"{name}: data.positive is {positive!r}, and there is no such class; {hint}"
    raise DataError(message)


def _check_ids(name: str, samples: Sequence[Sample]) -> None:
    if not samples:
        message = f"{name}: there are no samples; check that the path and the column names are right"
        raise DataError(message)
    bad = [s.id for s in samples if not s.id or not s.id.isprintable()]
    if bad:
        message = f"{name}: ids must be printable and not empty, and these are not: {listing(bad)}; rename them"
        raise DataError(message)
    splits: dict[str, list[Split]] = defaultdict(list)
    for sample in samples:
        splits[sample.id].append(sample.split)
    repeated = [f"{i} ({', '.join(found)})" for i, found in splits.items() if len(found) > 1]
    if repeated:
        message = f"{name}: {len(repeated)} ids occur more than once: {listing(repeated)}; keep one sample per id"
        raise DataError(message)


def _check_labels(name: str, samples: Sequence[Sample], class_names: Sequence[str], task: Task) -> None:
    classes = len(class_names)
    if classes < (1 if task == "multilabel" else 2) or (task == "binary" and classes != 2):
        wanted = {"binary": "exactly two classes", "multilabel": "at least one class"}.get(task, "at least two classes")
        message = f"{name}: a {task} task needs {wanted} and has {classes}: {listing(class_names)}"
        raise DataError(message)
    if task == "multilabel":
        bad = [s for s in samples if isinstance(s.label, int) or len(s.label) != classes or not set(s.label) <= {0, 1}]
        wanted = f"{classes} values of 0 or 1"
    else:
        bad = [s for s in samples if not isinstance(s.label, int) or not 0 <= s.label < classes]
        wanted = f"one of 0 to {classes - 1}"
    if bad:
        shown = listing(f"{s.id}: {s.label}" for s in bad)
        message = f"{name}: a label of this {task} task is {wanted}, and {len(bad)} samples differ: {shown}"
        raise DataError(message)


def _check_groups(name: str, samples: Sequence[Sample]) -> None:
    splits: dict[str, set[Split]] = defaultdict(set)
    for sample in samples:
        splits[sample.group].add(sample.split)
    straddling = [
        f"{group} ({', '.join(s for s in SPLITS if s in found)})" for group, found in splits.items() if len(found) > 1
    ]
    if straddling:
        message = (
            f"{name}: {len(straddling)} groups lie in more than one split: {listing(straddling)}; "
            f"move each group into one split, or leave the splits out and let them be drawn"
        )
        raise DataError(message)


def _check_classes(name: str, samples: Sequence[Sample], class_names: Sequence[str]) -> None:
    counts: dict[Split, list[int]] = {split: [0] * len(class_names) for split in SPLITS}
    for sample in samples:
        for k in positives(sample.label):
            counts[sample.split][k] += 1
    totals = [sum(counts[split][k] for split in SPLITS) for k in range(len(class_names))]
    empty = [class_names[k] for k, total in enumerate(totals) if not total]
    if empty:
        message = f"{name}: no sample belongs to {listing(empty)}; add images of it or remove the class"
        raise DataError(message)
    untrained = [
        f"{class_names[k]} (val {counts['val'][k]}, test {counts['test'][k]})"
        for k in range(len(class_names))
        if not counts["train"][k]
    ]
    if 0 < len(untrained) < len(class_names):  # without any train sample, it is a data set to test on
        message = (
            f"{name}: train has no sample of {listing(untrained)}; move some there or remove the class, or set "
            f"data.split.draw to null for data to test on only"
        )
        raise DataError(message)
