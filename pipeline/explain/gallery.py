"""The pictures of a split: samples as cases to draw, the sheet of surest hits and worst misses, and its strips."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

from pipeline.data import Dataset, Split
from pipeline.data.dataset import positives
from pipeline.evaluate import metrics
from pipeline.explain import overlays
from pipeline.explain.heat import GRAD_CAM, MEAN, Heat
from pipeline.explain.localise import Masks
from pipeline.explain.pictures import Case, HeatMap, draw_case, draw_sheet, draw_strip, gate_maps, varies
from pipeline.model.overlay import Overlay
from pipeline.model.tasks import Task
from pipeline.progress import Progress
from pipeline.train.feeding.feed import Feed

_PAINTED = "painted with its masks"
_DRAWN_PX = 512  # longer sides are drawn smaller
_LAID_PX = 256  # longest side of a heat map over an image
_SHEET = "sheet.png"
_STRIPS = "strips"  # folder of what is on the sheet, sample by sample and without words

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Verdicts:
    """What was said of each sample of a feed.

    Attributes:
        true: Name of its class; for several labels, those that are set.
        predicted: Likewise.
        said: Probability of what was predicted; of several labels, the product of each one's, as if independent.
        truth: Probability of what is true, likewise.
    """

    true: list[str]
    predicted: list[str]
    said: Floats
    truth: Floats

    def choose(self, count: int) -> tuple[list[int], list[int]]:
        """The `count` surest hits and worst misses: the truth's probability highest, and lowest."""
        right = [a == b for a, b in zip(self.true, self.predicted, strict=True)]
        order = np.argsort(self.truth, kind="stable").tolist()
        hits, misses = ([i for i in order if right[i] == wanted] for wanted in (True, False))
        return hits[::-1][:count], misses[:count]


def judge(task: Task, feed: Feed, heat: Heat, class_names: Sequence[str]) -> Verdicts:
    """Spell out truth and prediction of each sample, with their probabilities."""
    called, p = metrics.predictions(task, heat.probabilities), heat.probabilities

    def spell(label: Any) -> str:
        label = tuple(label.tolist()) if task == "multilabel" else int(label)
        return "|".join(class_names[k] for k in positives(label)) or "none"

    def probability(labels: npt.NDArray[np.int64]) -> Floats:
        if task == "multilabel":
            return np.asarray(np.where(labels == 1, p, 1 - p).prod(axis=1))
        return np.asarray(np.take_along_axis(p, labels[:, None], axis=1)[:, 0])

    return Verdicts(
        [spell(label) for label in feed.labels],
        [spell(label) for label in called],
        probability(called),
        probability(feed.labels),
    )


class Gallery:
    """The samples of a split as cases to draw.

    Args:
        dataset: Their images.
        feed: The samples, in their order.
        heat: Where the classifier looked.
        verdicts: What it said.
        masks: Where the lesions are.
        split: Which one it is.
        overlay: What paints masks over the images, if the classifier sees them painted.

    Attributes:
        indices: Of the samples in the data set.
        ranges: Lowest and highest value of each map over the split.
    """

    def __init__(
        self,
        dataset: Dataset,
        feed: Feed,
        heat: Heat,
        verdicts: Verdicts,
        masks: Masks,
        split: Split,
        overlay: Overlay | None,
    ) -> None:
        place = {sample.id: index for index, sample in enumerate(dataset.samples)}
        self.ids, self.feed = feed.ids, feed
        self.indices = [place[name] for name in feed.ids]
        self.heat, self.split, self.ranges = heat, split, {n: heat.range(n) for n in heat.names}
        self.masks, self._dataset, self._verdicts, self._overlay = masks, dataset, verdicts, overlay

    def case(self, position: int, kinds: Sequence[str]) -> Case:
        """A sample with the maps of some kinds, all of a size to draw."""
        image, mask = (self._dataset.read(self.indices[position]), self.masks(self.indices[position]))
        height, width = _within(image.shape[:2], _LAID_PX)
        shrunk, maps = _shrunk(image), list[HeatMap]()
        if self._overlay is not None:
            maps.append(HeatMap(_PAINTED, overlays.paint(self._overlay, self.feed, position, shrunk), 0.0, 255.0))
        for kind in kinds:
            values = self.heat.lay(kind, [position], (height, width))[0]
            if kind == GRAD_CAM:
                maps.append(HeatMap(kind, values, 0.0, float(values.max())))
            else:
                maps += gate_maps(kind, values, *self.ranges[kind])
        return Case(
            name=self.ids[position],
            image=shrunk,
            mask=mask if mask is None else _shrunk(mask),
            true=self._verdicts.true[position],
            predicted=self._verdicts.predicted[position],
            probability=float(self._verdicts.said[position]),
            maps=tuple(maps),
        )

    def draw(self, folder: Path, chosen: Sequence[int], count: int, progress: Progress) -> dict[str, Any]:
        """Draw the samples and the sheet."""
        hits, misses = self._verdicts.choose(count)
        positions = list(dict.fromkeys(chosen or (*hits, *misses)))
        images = []
        for done, position in enumerate(positions, start=1):
            case = self.case(position, self.heat.names)
            file = file_name(case.name)
            draw_case(folder / file, case)
            images.append(
                {
                    "id": case.name,
                    "true": case.true,
                    "predicted": case.predicted,
                    "probability": case.probability,
                    "file": file,
                    "alt": self._alt(case),
                }
            )
            progress("draw", done, len(positions))
        return {"images": images, "sheet": self._sheet(folder, hits, misses, count)}

    def _sheet(self, folder: Path, hits: Sequence[int], misses: Sequence[int], count: int) -> dict[str, Any]:
        """Draw the contact sheet: each sample with the mean of its gates, and Grad-CAM."""
        gates = [MEAN] if MEAN in self.heat.names else [*self.heat.gates]
        kinds = [*gates, GRAD_CAM]
        total = len(self.ids)
        wrong = sum(a != b for a, b in zip(self._verdicts.true, self._verdicts.predicted, strict=True))
        blocks = {
            f"Surest hits ({total - wrong} of {total} {self.split} images are right)": hits,
            f"Worst misses ({wrong} of {total} are wrong)": misses,
        }
        cases = {heading: [self.case(i, kinds) for i in some] for heading, some in blocks.items()}
        draw_sheet(folder / _SHEET, cases, columns=max(len(hits), len(misses)), empty="There are none to show.")
        alt = (
            f"Contact sheet of the {self.split} images: the {len(hits)} surest of {total - wrong} hits and the "
            f"{len(misses)} worst of {wrong} misses, each as the image with "
            f"{' and '.join(self._told(kind) for kind in kinds)} below it."
        )
        shown = {"hits": [self.ids[i] for i in hits], "misses": [self.ids[i] for i in misses]}
        strips = {heading: self._strips(folder, some, kinds) for heading, some in cases.items()}
        return {"file": _SHEET, "alt": alt, **shown, "strips": strips}

    def _strips(self, folder: Path, cases: Sequence[Case], kinds: Sequence[str]) -> list[dict[str, Any]]:
        """Draw samples one by one; what is said of each, and the colours of its maps."""
        (folder / _STRIPS).mkdir(exist_ok=True)
        found = []
        for case in cases:
            file = f"{_STRIPS}/strip_{file_name(case.name)}"
            draw_strip(folder / file, case)
            said = {"id": case.name, "true": case.true, "predicted": case.predicted, "probability": case.probability}
            colours = {
                one.title: {"low": one.low, "high": one.high, "own": one.title == GRAD_CAM, "words": one.words}
                | ({"painted": True} if one.painted else {})
                for one in case.maps
            }
            found.append({**said, "file": file, "alt": self._alt(case, kinds), "colours": colours})
        return found

    def _told(self, kind: str) -> str:
        """A map's name, and how much it varies where it has a scale."""
        return kind if kind == GRAD_CAM else f"{kind} ({varies(*self.ranges[kind])})"

    def _alt(self, case: Case, kinds: Sequence[str] = ()) -> str:
        """One sentence for who cannot see the picture."""
        outline = "" if case.mask is None else ", the lesion outlined"
        outline += "" if self._overlay is None else ", and as it is painted with its masks"
        return (
            f"Image {case.name} of the {self.split} split{outline}: its class is {case.true}, the classifier "
            f"said {case.predicted} with probability {case.probability:.2f}; beside it heat maps of "
            f"{', '.join(self._told(kind) for kind in kinds or self.heat.names)}."
        )


def file_name(sample_id: str) -> str:
    """Name the picture of a sample: its id where that is a safe file name, else what is safe of it and a digest.

    No two ids share a name, on file systems too that do not tell capital letters from small ones.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", sample_id).strip("._-")[-80:]
    if safe != sample_id or safe != safe.lower() or f"{safe}.png" == _SHEET:
        safe = f"{safe}-{hashlib.sha256(sample_id.encode()).hexdigest()[:8]}"
    return f"{safe}.png"


def _within(size: Sequence[int], longest: int) -> tuple[int, int]:
    """Scale (H, W) down so that no side is longer."""
    scale = min(1.0, longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _shrunk(pixels: Any) -> Any:
    """An image or a mask of a size to draw."""
    height, width = _within(pixels.shape[:2], _DRAWN_PX)
    if (height, width) == pixels.shape[:2]:
        return pixels
    resampling = Pillow.Resampling.NEAREST if pixels.dtype == bool else Pillow.Resampling.BOX
    return np.asarray(Pillow.fromarray(pixels).resize((width, height), resampling))
