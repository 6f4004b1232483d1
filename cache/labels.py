"""Labels that travel with a store: class names, and each row's label and split, where somebody chose to send them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cache.errors import StoreError, UntrustedStoreError
from cache.fingerprint import JSON

Label = int | tuple[int, ...]
_KEYS = {"class_names", "labels", "splits", "groups", "task"}


@dataclass(frozen=True)
class Labels:
    """What is known of the samples of a store, in row order.

    Attributes:
        class_names: Names of the classes.
        labels: Class number of each row, or one number a class for several at once.
        splits: Split of each row: `"train"`, `"val"` or `"test"`.
        groups: What must not straddle splits, such as the patient, of each row; empty where that is not known.
        task: What the labels mean, in the words of whoever sent them; empty where that was not said.
    """

    class_names: tuple[str, ...]
    labels: tuple[Label, ...]
    splits: tuple[str, ...]
    groups: tuple[str, ...] = ()
    task: str = ""

    def to_json(self) -> dict[str, JSON]:
        """As stored in `index/labels`; what is not known is left out."""
        known: dict[str, JSON] = {"class_names": self.class_names, "labels": self.labels, "splits": self.splits}
        return known | ({"groups": self.groups} if self.groups else {}) | ({"task": self.task} if self.task else {})

    def select(self, rows: Sequence[int]) -> Labels:
        """The labels of some rows, in their order."""
        groups = tuple(self.groups[i] for i in rows) if self.groups else ()
        labels, splits = tuple(self.labels[i] for i in rows), tuple(self.splits[i] for i in rows)
        return replace(self, labels=labels, splits=splits, groups=groups)

    def with_blanks(self, count: int) -> Labels:
        """The labels with those of samples behind the rows that are set aside, which have none and lose none."""
        blank = ("",) * count
        groups = (*self.groups, *blank) if self.groups else ()
        return replace(self, labels=(*self.labels, *[0] * count), splits=(*self.splits, *blank), groups=groups)

    def check(self, rows: int) -> None:
        """Refuse labels that do not fit.

        Raises:
            StoreError: There is not one label and split for each row, or a label is no class.
        """
        if not len(self.labels) == len(self.splits) == rows:
            message = (
                f"{len(self.labels)} labels and {len(self.splits)} splits were given for {rows} rows; give one each"
            )
            raise StoreError(message)
        if self.groups and len(self.groups) != rows:
            message = f"{len(self.groups)} groups were given for {rows} rows; give one each, or none"
            raise StoreError(message)
        classes = len(self.class_names)
        for label in self.labels:
            good = 0 <= label < classes if isinstance(label, int) else len(label) == classes
            if not good:
                message = f"label {label!r} is none of the {classes} classes {self.class_names!r}"
                raise StoreError(message)


def parse_labels(value: JSON, rows: int, where: str) -> Labels:
    """Labels as a stranger stored them.

    Raises:
        UntrustedStoreError: They are malformed or do not fit the rows.
    """
    try:
        parts: Mapping[str, JSON] = value
        names, splits = parts["class_names"], parts["splits"]
        groups, task = parts.get("groups", []), parts.get("task", "")
        labels = tuple(_label(label) for label in parts["labels"])
        known = {"class_names", "labels", "splits"} <= parts.keys() <= _KEYS and isinstance(groups, list)
        if not known or not all(isinstance(t, str) for t in (*names, *splits, *groups, task)):
            message = "a key or a type is wrong"
            raise TypeError(message)
        found = Labels(tuple(names), labels, tuple(splits), tuple(groups), task)
        found.check(rows)
    except (KeyError, TypeError, AttributeError, StoreError) as error:
        message = f"{where}: the stored labels are malformed ({error}); the store is not trustworthy"
        raise UntrustedStoreError(message) from error
    return found


def _label(value: JSON) -> Label:
    if type(value) is int:
        return value
    if isinstance(value, list) and all(type(item) is int for item in value):
        return tuple(value)
    message = f"{str(value)[:100]!r} is no label"
    raise TypeError(message)
