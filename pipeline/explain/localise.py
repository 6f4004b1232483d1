"""How well a map finds the lesion, where masks say where it is, against chance and against always saying "the middle".

All scores are taken over the image cut into 128 x 128 equal cells: c is the part of a cell that is lesion (0 or 1 but
at its edge) and v >= 0 the map there. The definitions of mass and lift are ours, as are those of chance; the pointing
game is Zhang et al., "Top-down neural attention by excitation backprop", ECCV 2016, without its margin of 15 px.

    mass      sum(v c) / sum(v), the share of the map that lies on the lesion; chance is mean(c), its share of the area
    lift      mass / mean(c): the map's mean on the lesion over its mean on the image; chance is 1
    pointing  c where v is highest (their mean, if several cells are); chance is mean(c)
    auc       chance that a place on the lesion has a higher value than one off it, ties half; chance is .5
    auc_elsewhere   the same with the mask of another image, of another group: what the map owes to lesions lying alike

A gate lies in (0, 1) and may hardly vary, so that mass and lift are near chance whatever it shows; `auc` asks for the
order of the values alone. A gate that is *lower* on the lesion has an auc below .5, and 1 - gate has 1 - auc, so it
needs no row of its own. Either may come without learning: the features of a segmenter tell lesion from tissue, and a
gate with weights just drawn then lies far above or below .5, by the luck of its signs (`score_untrained`). So an auc
says that a gate varies with the lesion; what training added shows beside the untrained ones. Values within a millionth
of the map's highest are equal: they differ by rounding. A map that is zero throughout gets what chance gets.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from pipeline.data import Dataset
from pipeline.data.dataset import Mask
from pipeline.data.image import SUFFIXES, read_mask
from pipeline.data.layouts.files import Files
from pipeline.errors import DataError
from pipeline.evaluate import intervals
from pipeline.explain.heat import Heat, untrained_gates
from pipeline.model.classifier import Classifier
from pipeline.progress import Progress, silent
from pipeline.train.feeding.feed import Feed

SIDE = 128
CENTRE = "centre of the image"
SCORES = ("mass", "lift", "pointing", "auc", "auc_elsewhere")
_AT_ONCE = 64
_UNTRAINED = 256
_SUFFIX_WORD = re.compile(r"(_[A-Za-z]+(_?\d+)?)?")  # `_mask`; and `_mask_1`, lest a second mask be overlooked

Floats = npt.NDArray[np.floating[Any]]
Cells = npt.NDArray[np.float16]


class Masks:
    """Where the lesions of a data set are: its own masks, or the image files of a folder.

    A file belongs to the sample whose id is its path below the folder (both without suffix), or else to the one whose
    id ends with its name, if there is only one such sample. A word may follow the id, as in `a_mask.png` and
    `a_segmentation.png` of sample `a`, and a number the word; a file named as a sample itself is nobody else's. The
    data set's own images are no masks, where they lie in the same folder.

    Args:
        dataset: The samples.
        folder: Image files, in which what is not zero is lesion (in a JPEG file, which is not exact, what is above
            127); None for the data set's own masks.

    Raises:
        DataError: There is no such folder, no file in it is of a sample, or several are of one.
    """

    def __init__(self, dataset: Dataset, folder: Path | None = None) -> None:
        self._dataset, self._folder = dataset, folder
        self._files = {} if folder is None else _match(dataset, folder)

    def __call__(self, index: int) -> Mask | None:
        """Where the lesion of a sample is, bool (H, W); None where that is not known.

        Raises:
            DataError: The mask cannot be read, or is not of the size of its image.
        """
        if self._folder is None:
            return self._dataset.mask(index)
        if index not in self._files:
            return None
        mask = read_mask(self._files[index])
        size = self._dataset.read(index).shape[:2]
        if mask.shape != size:
            message = (
                f"{self._files[index]}: the mask is {mask.shape[0]} x {mask.shape[1]} and its image "
                f"{size[0]} x {size[1]} (height x width); draw it on the image's own pixels"
            )
            raise DataError(message)
        return mask


def cover(masks: Masks, indices: Sequence[int], workers: int = 2) -> tuple[list[int], Cells]:
    """Find where lesions are, in cells; images without a lesion, or with nothing else, are left out.

    Args:
        masks: Where lesions are.
        indices: Places of n samples in the data set.
        workers: Threads that read masks.

    Returns:
        Positions among the n of the m samples whose lesion is known, and the part of each cell that it covers,
        (m, SIDE, SIDE) float16.
    """

    def one(index: int) -> npt.NDArray[np.float16] | None:
        mask = masks(index)
        if mask is None or not mask.any() or mask.all():
            return None
        pooled = F.adaptive_avg_pool2d(torch.from_numpy(mask).float()[None], (SIDE, SIDE))[0]
        cells: npt.NDArray[np.float16] = pooled.half().numpy()  # two bytes: 330 MB for ten thousand images
        return cells

    with ThreadPoolExecutor(workers, "mask") as pool:
        found = dict(_known(pool.map(one, indices)))
    return [*found], np.stack([*found.values()]) if found else np.empty((0, SIDE, SIDE), np.float16)


def score_maps(
    heat: Heat,
    kept: Sequence[int],
    cells: Cells,
    groups: Sequence[str],
    progress: Progress = silent,
) -> dict[str, dict[str, Floats]]:
    """Score every map of the images whose lesion is known.

    Args:
        heat: The maps.
        kept: Positions of the m images among those of `heat`, and
        cells: their lesions (m, SIDE, SIDE), as `cover` gives both.
        groups: Group of each sample of `heat`.
        progress: Called after each batch.

    Returns:
        By map and name of `SCORES`, (m,) each; `auc_elsewhere` is NaN where all images are of one group.
    """
    other = _partners([groups[position] for position in kept])
    scores: dict[str, dict[str, Floats]] = {
        name: {score: np.full(len(kept), np.nan) for score in SCORES} for name in (*heat.names, CENTRE)
    }
    for start in range(0, len(kept), _AT_ONCE):
        part = range(start, min(start + _AT_ONCE, len(kept)))
        for name, into in scores.items():
            laid = _centre(len(part)) if name == CENTRE else heat.lay(name, kept[part.start : part.stop], (SIDE, SIDE))
            for row, values in zip(part, laid, strict=True):
                found = score_map(values, cells[row], None if other is None else cells[other[row]])
                for score, value in found.items():
                    into[score][row] = value
        progress("localise", part.stop, len(kept))
    return scores


def score_untrained(
    classifier: Classifier, feed: Feed, kept: Sequence[int], cells: Cells, *, seeds: int = 5
) -> dict[str, list[float]]:
    """Mean auc of each stored tap's gate, newly drawn from each seed, over the first 256 images with a lesion."""
    kept, found = kept[:_UNTRAINED], dict[str, list[float]]()
    for drawn in untrained_gates(classifier, feed, kept, seeds=range(seeds)):
        for name, maps in drawn.items():
            laid = maps.lay(torch.arange(len(kept)), (SIDE, SIDE)).numpy()
            aucs = [score_map(values, cover)["auc"] for values, cover in zip(laid, cells, strict=False)]
            found.setdefault(name, []).append(float(np.mean(aucs)))
    return found


def score_map(values: Floats, cover: Floats, elsewhere: Floats | None = None) -> dict[str, float]:
    """Compute the scores of one map.

    Args:
        values: v (H, W), not negative.
        cover: c (H, W) in 0..1, neither 0 throughout nor 1.
        elsewhere: c of another image.
    """
    highest = float(values.max())
    flat = np.round(values.ravel().astype(np.float64) / (highest or 1.0), 6)
    weights = cover.ravel().astype(np.float64)
    _, at = np.unique(flat, return_inverse=True)
    counts, inside = _sums(at, np.ones_like(weights)), _sums(at, weights)
    share = float(weights.mean())
    mass = float((flat * weights).sum() / flat.sum()) if highest > 0 else share
    there = None if elsewhere is None else _sums(at, elsewhere.ravel())
    return {
        "mass": mass,
        "lift": mass / share,
        "pointing": float(inside[-1] / counts[-1]),
        "auc": _auc(inside, counts),
        "auc_elsewhere": np.nan if there is None else _auc(there, counts),
    }


def summarise(
    scores: Mapping[str, Mapping[str, Floats]],
    share: Floats,
    groups: Sequence[str],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Average over images, with 95 % intervals by drawing groups.

    Args:
        scores: By map and score, (m,) each.
        share: Of each image that is lesion, (m,).
        groups: Of each image.
        resamples: Draws.
        seed: Of the draws.

    Returns:
        `images`, `groups`, `bootstrap`; `chance`, by score; `maps`, by map and score `value`, `low` and `high`.
        `auc_elsewhere` is missing where all images are of one group.
    """
    columns = {(name, score): values for name, found in scores.items() for score, values in found.items()}
    columns = {key: values for key, values in columns.items() if not np.isnan(values).any()}
    columns["", "share"] = share
    means = averages(np.stack([*columns.values()], axis=1), groups, resamples=resamples, seed=seed)
    spelled = dict(zip(columns, means, strict=True))
    area = spelled.pop(("", "share"))
    return {
        "images": len(share),
        "groups": len(set(groups)),
        "bootstrap": {"resamples": resamples, "seed": seed},
        "chance": {"mass": area["value"], "lift": 1.0, "pointing": area["value"], "auc": 0.5},
        "maps": {
            name: {score: spelled[name, score] for score in found if (name, score) in spelled}
            for name, found in scores.items()
        },
    }


def averages(table: Floats, groups: Sequence[str], *, resamples: int, seed: int) -> list[dict[str, float]]:
    """The mean of each column of a table (m, columns), with its 95 % interval by drawing groups.

    Returns:
        `value`, `low` and `high` of each column.
    """

    def means(weights: Floats) -> dict[str, Floats]:
        return {"means": weights.astype(np.float64) @ table / weights.sum(axis=1, keepdims=True)}

    low, high = intervals.interval(intervals.resample(means, groups, resamples=resamples, seed=seed)["means"])
    return [
        {"value": float(value), "low": float(a), "high": float(b)}
        for value, a, b in zip(table.mean(axis=0), low, high, strict=True)
    ]


def _sums(at: npt.NDArray[np.intp], weights: Floats) -> Floats:
    """Sum the weights of the cells of each value: (levels,)."""
    return np.asarray(np.bincount(at, weights.astype(np.float64)), np.float64)


def _auc(inside: Floats, counts: Floats) -> float:
    """Area under the ROC curve from the lesion's part (levels,) of the cells (levels,) of each value, ascending."""
    outside = counts - inside
    below = np.cumsum(outside) - outside
    total = inside.sum() * outside.sum()
    return float((inside * (below + outside / 2)).sum() / total)


def _known(covers: Iterator[npt.NDArray[np.float16] | None]) -> Iterator[tuple[int, npt.NDArray[np.float16]]]:
    for position, cover in enumerate(covers):
        if cover is not None:
            yield position, cover


def _partners(groups: Sequence[str]) -> list[int] | None:
    """For each image the next one of another group, in a ring; None where all are of one group."""
    count = len(groups)
    if len(set(groups)) < 2:
        return None
    return [next(j % count for j in range(i + 1, i + count) if groups[j % count] != groups[i]) for i in range(count)]


def _centre(count: int) -> Floats:
    """A map that is highest in the middle whatever the image: (count, SIDE, SIDE) in 0..1."""
    at = np.linspace(-1, 1, SIDE)
    distance = np.hypot(at[:, None], at[None, :])
    return np.broadcast_to(1 - distance / distance.max(), (count, SIDE, SIDE))


def _match(dataset: Dataset, folder: Path) -> dict[int, Path]:
    """Find the mask file of each sample."""
    if not folder.is_dir():
        message = f"{folder}: there is no such folder; name one that holds an image file per sample"
        raise DataError(message)
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    keys = [_without_suffix(sample.id) for sample in dataset.samples]
    of_key, of_name = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    for index, key in enumerate(keys):
        of_key[key].append(index)
        of_name[PurePosixPath(key).name].append(index)
    by_path, by_name = defaultdict[int, list[Path]](list), defaultdict[int, list[Path]](list)
    for path in _without_images(files, dataset):
        key = path.relative_to(folder).with_suffix("").as_posix()
        if (owner := _owner(key, of_key)) is not None:
            by_path[owner].append(path)
        elif (owner := _owner(PurePosixPath(key).name, of_name)) is not None:
            by_name[owner].append(path)
    found = {**by_name, **by_path}
    for index, fitting in found.items():
        if len(fitting) > 1:
            message = (
                f"{folder}: both {str(fitting[0])!r} and {str(fitting[1])!r} may be the mask of sample "
                f"{dataset.samples[index].id!r}; leave one file per sample, with all of its lesions in it"
            )
            raise DataError(message)
    if not found:
        message = (
            f"{folder}: none of its {len(files)} image files is named as a sample; the mask of sample "
            f"{dataset.samples[0].id!r} would be {keys[0] + '.png'!r} or {keys[0] + '_mask.png'!r}"
        )
        raise DataError(message)
    return {index: fitting[0] for index, fitting in found.items()}


def _without_images(files: Sequence[Path], dataset: Dataset) -> list[Path]:
    """Those of the files that are not the data set's own images."""
    source, images = dataset.source, set[Path]()
    if isinstance(source, Files) and isinstance(source.root, Path):
        images = {(source.root / name).resolve() for name in source.names}
    return [path for path in files if path.resolve() not in images]


def _owner(name: str, samples: Mapping[str, Sequence[int]]) -> int | None:
    """The sample a mask is named after: the longest name that the mask's is, or begins with before a word."""
    stem = name
    while stem not in samples and "_" in stem:
        stem = stem.rpartition("_")[0]
    found = samples.get(stem, ())
    return found[0] if len(found) == 1 and _SUFFIX_WORD.fullmatch(name[len(stem) :]) else None


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return path.with_suffix("").as_posix() if path.suffix.lower() in SUFFIXES else name
