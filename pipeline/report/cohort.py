"""From what was found to what was used: how many images and patients each step kept, and why not the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.data import Dataset, Split
from pipeline.data.dataset import SPLITS


@dataclass(frozen=True)
class Part:
    """A split on its way.

    Attributes:
        split: Its name.
        images: In the data set.
        groups: That they are of.
        set_aside: Images that cannot be read.
        missing: Images that the store lacks for another reason.
        left_out: Images that were at hand and not used, such as by `train.fraction` or `train.shots`.
        used: Images that were trained on, chosen on or scored.
        used_groups: That those are of.
    """

    split: Split
    images: int
    groups: int
    set_aside: int
    missing: int
    left_out: int
    used: int
    used_groups: int


@dataclass(frozen=True)
class Cohort:
    """The way from files to figures; at each step the numbers add up.

    Attributes:
        ignored: Files that are no image of the data set, by suffix.
        parts: The splits.
        reasons: Why images were set aside, each with how many.
    """

    ignored: Mapping[str, int]
    parts: Sequence[Part]
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Of the data set."""
        return sum(part.images for part in self.parts)

    @property
    def found(self) -> int:
        """Files found."""
        return self.images + sum(self.ignored.values())


def follow(
    dataset: Dataset,
    used: Mapping[Split, Collection[str]],
    set_aside: Mapping[str, str],
    stored: Collection[str] | None,
) -> Cohort:
    """Say of every image of a data set where it went.

    Args:
        dataset: All images.
        used: Ids that were trained on, chosen on or scored, by split.
        set_aside: Reason by id of images that cannot be read.
        stored: Ids that the store holds; None where none is read, or it is gone.
    """
    parts = []
    for split in SPLITS:
        samples = [dataset.samples[i] for i in dataset.indices(split)]
        taken = frozenset(used.get(split, ()))
        kept = [sample for sample in samples if sample.id in taken]
        rest = [sample.id for sample in samples if sample.id not in taken]
        aside = [name for name in rest if name in set_aside]
        missing = [name for name in rest if name not in set_aside and stored is not None and name not in stored]
        parts.append(
            Part(
                split=split,
                images=len(samples),
                groups=len({sample.group for sample in samples}),
                set_aside=len(aside),
                missing=len(missing),
                left_out=len(rest) - len(aside) - len(missing),
                used=len(kept),
                used_groups=len({sample.group for sample in kept}),
            )
        )
    known = {sample.id for sample in dataset.samples}
    reasons = Counter(_short(reason, name) for name, reason in set_aside.items() if name in known)
    return Cohort(dict(dataset.ignored), parts, dict(reasons.most_common()))


def _short(reason: str, name: str) -> str:
    """A reason without the file that it is about, so that the same reasons count together."""
    return reason.rpartition(f"{name}: ")[2] or reason
