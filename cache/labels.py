"""Labels that travel with a store: class names, and each row's label and split, where somebody chose to send them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cache.errors import StoreError, UntrustedStoreError
from cache.fingerprint import JSON

Label = int | tuple[int, ...]


@dataclass(frozen=True)
class Labels:
    """What is known of the samples of a store, in row order.

    Attributes:
        class_names: Names of the classes.
        labels: Class number of each row, or one number a class for several at once.
        splits: Split of each row: `"train"`, `"val"` or `"test"`.
    """

    class_names: tuple[str, ...]
    labels: tuple[Label, ...]
    splits: tuple[str, ...]

    def to_json(self) -> dict[str, JSON]:
        """As stored in `index/labels`."""
        return {"class_names": self.class_names, "labels": self.labels, "splits": self.splits}

    def select(self, rows: Sequence[int]) -> Labels:
        """The labels of some rows, in their order."""
        return Labels(self.class_names, tuple(self.labels[i] for i in rows), tuple(self.splits[i] for i in rows))

    def with_blanks(self, count: int) -> Labels:
        """The labels with those of samples behind the rows that are set aside, which have none and lose none."""
        return Labels(self.class_names, (*self.labels, *[0] * count), (*self.splits, *[""] * count))

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
        labels = tuple(_label(label) for label in parts["labels"])
        if parts.keys() != {"class_names", "labels", "splits"} or not all(
            isinstance(t, str) for t in (*names, *splits)
        ):
            message = "a key or a type is wrong"
            raise TypeError(message)
        found = Labels(tuple(names), labels, tuple(splits))
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
