"""Where a finished run looked on a split: a picture per sample, a contact sheet, and how well it finds the lesion."""

from __future__ import annotations

import difflib
import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

from cache import Store
from pipeline.data import Dataset, Split
from pipeline.data.dataset import positives
from pipeline.errors import ConfigError, RunError
from pipeline.evaluate import metrics
from pipeline.explain import heat as heat_maps
from pipeline.explain import localise, overlays
from pipeline.explain.heat import GRAD_CAM, MEAN, Heat
from pipeline.explain.localise import Masks
from pipeline.explain.pictures import (
    Case,
    HeatMap,
    draw_case,
    draw_masks,
    draw_sheet,
    draw_strip,
    gate_maps,
    varies,
)
from pipeline.model.classifier import Classifier
from pipeline.model.overlay import Overlay
from pipeline.model.tasks import Task
from pipeline.progress import Progress, silent
from pipeline.train import run_folder
from pipeline.train.feeding.feed import Feed
from pipeline.train.finished_run import Trained
from pipeline.train.painted import count_masks
from pipeline.train.train import Machine

FOLDER = "explain"
PAINTED = "painted with its masks"
_DRAWN_PX = 512  # longer sides are drawn smaller
_LAID_PX = 256  # longest side of a heat map over an image
_SHEET = "sheet.png"
_STRIPS = "strips"  # folder of what is on the sheet, sample by sample and without words

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class _Verdicts:
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


def explain(
    folder: Path,
    dataset: Dataset,
    store: Store | None,
    *,
    split: Split = "test",
    names: Sequence[str] = (),
    count: int = 6,
    masks: Path | None = None,
    resamples: int = 2000,
    seed: int = 0,
    machine: Machine | None = None,
    allow_missing: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Draw where a finished run looked, and score it where masks say where the lesion is.

    Leaves in `folder / "explain"`, which is replaced as a whole: a PNG file per picture; `sheet.png`, and in `strips`
    what is on it, sample by sample; `explain.json`, what is returned; and with masks `localisation.csv`, a row per map
    and score, and `localisation_samples.csv`, a row per sample and map. A run with an overlay also has `masks_NAME.png`
    per picture, what leaving out each mask changes, and with masks `masks_samples.csv`, a row per sample.

    Each gate is drawn twice, its colours spanning 0 to 1, and its lowest to highest value over the whole split; so
    pictures can be compared, and the difference is said in words ("varies by 1 %"). Grad-CAM has no unit and spans each
    image's own.

    Args:
        folder: A finished run.
        dataset: The data set it was trained on, or another one with the same classes.
        store: Its features; may be None for a classifier without gates.
        split: What to look at.
        names: Samples to draw, by id or the end of one; none for those of the sheet.
        count: How many of the surest hits and of the worst misses are on the sheet.
        masks: A folder of mask images (see `localise.Masks`); None for the data set's own.
        resamples: Draws of groups for the intervals.
        seed: Of the draws.
        machine: What to compute on.
        allow_missing: Leave out samples that the store lacks.
        progress: Called as it goes on.

    Returns:
        `split`; `weights_sha256` of the model; `images`, by picture `id`, `true`, `predicted`, `probability`, `file`
        and `alt`; `sheet`, its `file`, `alt`, `hits`, `misses` and `strips`, by heading
        pictures with the `colours` of their maps (`low`, `high`, whether they are its `own`, and `words`); `ranges`, by
        map its lowest and highest value over the split; `localisation`, what `localise.summarise` gives, with
        `untrained_auc`, by gate that of
        newly drawn weights from five seeds, and `left_out`, images without a lesion; or None without masks; and, of a
        run with an overlay, `overlay`: its options, what `count_masks` counts, `cases`, by picture what
        `overlays.spell` says, and `localisation`, what `overlays.summarise` gives, or None without lesion masks.

    Raises:
        RunError: No finished run, other classes, or features of another fingerprint.
        ConfigError: A name is no sample's of the split.
        DataError: An image or a mask cannot be read, or which mask is whose is not clear.
    """
    machine = machine or Machine()
    if not run_folder.load_description(folder).model.reads_images:
        msg = (
            f"The run {str(folder)!r} classifies pooled features and looks at no image, so there is no place that it "
            f"looked at: explain a run with a backbone."
        )
        raise RunError(msg)
    trained = Trained(folder, dataset, store, machine=machine, allow_missing=allow_missing, progress=progress)
    feed = trained.feed(split)
    if not len(feed):
        msg = f"Split {split!r} of {dataset.name!r} is empty: name another one."
        raise ConfigError(msg)
    chosen = [_find(name, feed.ids, dataset, split) for name in names]
    lesions = Masks(dataset, masks)
    heat = heat_maps.look(
        trained.classifier, trained.description.head, feed, precision=trained.precision, progress=progress
    )
    trained.check(feed)
    verdicts = _judge(dataset.task, feed, heat, dataset.class_names)
    pictures = _Pictures(dataset, feed, heat, verdicts, lesions, split, trained.classifier.overlay)
    scratch = _fresh(folder / f"{FOLDER}-partial")
    found: dict[str, Any] = {
        "split": split,
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        **pictures.draw(scratch, chosen, count, progress),
        "ranges": {name: dict(zip(("low", "high"), pictures.ranges[name], strict=True)) for name in pictures.ranges},
        "localisation": _localise(
            scratch,
            pictures,
            trained.classifier,
            feed,
            resamples=resamples,
            seed=seed,
            workers=machine.workers,
            progress=progress,
        ),
    }
    if trained.classifier.overlay is not None and store is not None:
        found["overlay"] = _explain_overlay(
            scratch, pictures, trained, store, found["images"], resamples=resamples, seed=seed, workers=machine.workers,
            progress=progress,
        )  # fmt: skip
    run_folder.write_json(scratch / "explain.json", found)
    _swap(scratch, folder / FOLDER)
    return found


class _Pictures:
    """The samples of a split as cases to draw."""

    def __init__(
        self,
        dataset: Dataset,
        feed: Feed,
        heat: Heat,
        verdicts: _Verdicts,
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
            maps.append(HeatMap(PAINTED, overlays.paint(self._overlay, self.feed, position, shrunk), 0.0, 255.0))
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


def _explain_overlay(
    folder: Path,
    pictures: _Pictures,
    trained: Trained,
    store: Store,
    images: Sequence[Mapping[str, Any]],
    *,
    resamples: int,
    seed: int,
    workers: int,
    progress: Progress,
) -> dict[str, Any]:
    """Say and draw what each mask of the drawn images changes, and score the masks where lesions are known."""
    classifier, feed = trained.classifier, pictures.feed
    assert classifier.overlay is not None
    names, at = trained.description.class_names, {name: position for position, name in enumerate(feed.ids)}
    cases = []
    for done, image in enumerate(images, start=1):
        position = at[image["id"]]
        taken = overlays.take_apart(
            classifier, trained.description.head, feed, position, store, precision=trained.precision
        )
        said = overlays.spell(taken, names)
        file = f"masks_{image['file']}"
        bars = overlays.bars(taken, said)
        rest = f"{len(said['masks']) + said['more'] - len(bars)} more masks" if len(bars) < len(said["masks"]) else ""
        draw_masks(folder / file, pictures.case(position, [GRAD_CAM]), said["said"], bars, rest)
        cases.append(
            {"id": image["id"], "true": image["true"], "file": file, "alt": _alt_of_masks(image, said), **said}
        )
        progress("leave masks out", done, len(images))
    found: dict[str, Any] = {**asdict(classifier.overlay.options), **count_masks(classifier, feed), "cases": cases}
    lesions = [pictures.masks(index) for index in pictures.indices]
    kept = [i for i, lesion in enumerate(lesions) if lesion is not None and lesion.any() and not lesion.all()]
    if not kept:
        return {**found, "localisation": None}
    best = overlays.best_overlaps(
        classifier.overlay,
        feed,
        kept,
        lambda i: pictures.masks(pictures.indices[i]),
        workers=workers,
        progress=progress,
    )
    rows = [
        {"id": feed.ids[i], "group": feed.groups[i], "best_iou": float(iou)} for i, iou in zip(kept, best, strict=True)
    ]
    run_folder.write_csv(folder / "masks_samples.csv", rows)
    scored = overlays.summarise(best, [feed.groups[i] for i in kept], resamples=resamples, seed=seed)
    return {**found, "localisation": scored}


def _alt_of_masks(image: Mapping[str, Any], said: Mapping[str, Any]) -> str:
    """One sentence for who cannot see which masks matter."""
    most = max(said["masks"], key=lambda mask: abs(mask["change"]), default=None)
    if most is None:
        return f"Image {image['id']}: no mask was found, so the classifier saw it plain."
    return (
        f"Image {image['id']} as it is painted, and by how much each of its masks changes the probability of "
        f"{said['said']}: most of all mask {most['rank']}, by {most['change']:+.3f}; without any mask the probability "
        f"is {said['plain'][said['said']]:.3f} in place of {said['probabilities'][said['said']]:.3f}."
    )


def _localise(
    folder: Path,
    pictures: _Pictures,
    classifier: Classifier,
    feed: Feed,
    *,
    resamples: int,
    seed: int,
    workers: int,
    progress: Progress,
) -> dict[str, Any] | None:
    """Score the maps against the masks, and write the tables; None where no lesion is known."""
    kept, cells = localise.cover(pictures.masks, pictures.indices, workers)
    if not kept:
        return None
    scores = localise.score_maps(pictures.heat, kept, cells, feed.groups, progress)
    share = cells.mean(axis=(1, 2), dtype=np.float64)
    groups = [feed.groups[position] for position in kept]
    found = localise.summarise(scores, share, groups, resamples=resamples, seed=seed)
    rows = [
        {"map": name, "score": score, **value, "chance": found["chance"].get(score, "")}
        for name, values in found["maps"].items()
        for score, value in values.items()
    ]
    run_folder.write_csv(folder / "localisation.csv", rows)
    by_sample = [
        {"id": feed.ids[kept[row]], "group": groups[row], "map": name, "share": float(share[row])}
        | {score: float(column[row]) for score, column in values.items() if score in found["maps"][name]}
        for row in range(len(kept))
        for name, values in scores.items()
    ]
    run_folder.write_csv(folder / "localisation_samples.csv", by_sample)
    untrained = localise.score_untrained(classifier, feed, kept, cells)
    return {**found, "untrained_auc": untrained, "left_out": len(feed) - len(kept)}


def _judge(task: Task, feed: Feed, heat: Heat, class_names: Sequence[str]) -> _Verdicts:
    """Spell out truth and prediction of each sample, with their probabilities."""
    called, p = metrics.predictions(task, heat.probabilities), heat.probabilities

    def spell(label: Any) -> str:
        label = tuple(label.tolist()) if task == "multilabel" else int(label)
        return "|".join(class_names[k] for k in positives(label)) or "none"

    def probability(labels: npt.NDArray[np.int64]) -> Floats:
        if task == "multilabel":
            return np.asarray(np.where(labels == 1, p, 1 - p).prod(axis=1))
        return np.asarray(np.take_along_axis(p, labels[:, None], axis=1)[:, 0])

    return _Verdicts(
        [spell(label) for label in feed.labels],
        [spell(label) for label in called],
        probability(called),
        probability(feed.labels),
    )


def file_name(sample_id: str) -> str:
    """Name the picture of a sample: its id where that is a safe file name, else what is safe of it and a digest.

    No two ids share a name, on file systems too that do not tell capital letters from small ones.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", sample_id).strip("._-")[-80:]
    if safe != sample_id or safe != safe.lower() or f"{safe}.png" == _SHEET:
        safe = f"{safe}-{hashlib.sha256(sample_id.encode()).hexdigest()[:8]}"
    return f"{safe}.png"


def _find(name: str, ids: Sequence[str], dataset: Dataset, split: Split) -> int:
    """Position of the sample that a person named: by id, by the end of its path, or by the path of its file."""
    exact = {sample_id: position for position, sample_id in enumerate(ids)}
    if name in exact:
        return exact[name]
    found = [position for position, sample_id in enumerate(ids) if _same_file(name, sample_id)]
    if len(found) == 1:
        return found[0]
    if found:
        msg = f"{name!r} may be {ids[found[0]]!r} or {ids[found[1]]!r}: give the whole id."
        raise ConfigError(msg)
    elsewhere = [s for s in dataset.samples if s.id == name or _same_file(name, s.id)]
    if elsewhere and elsewhere[0].split != split:
        msg = f"{name!r} is in split {elsewhere[0].split!r}, not in {split!r}: name it with --split."
        raise ConfigError(msg)
    near = difflib.get_close_matches(name, ids, n=1, cutoff=0.0)
    msg = f"There is no sample {name!r} in split {split!r}: ids look like {near[0]!r}."
    raise ConfigError(msg)


def _same_file(name: str, sample_id: str) -> bool:
    """Whether one is the end of the other, as paths without suffix."""
    ours, theirs = (PurePosixPath(text).with_suffix("").parts for text in (name, sample_id))
    shorter = min(len(ours), len(theirs))
    return shorter > 0 and ours[-shorter:] == theirs[-shorter:]


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


def _fresh(folder: Path) -> Path:
    """An empty folder, whatever a killed process left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _swap(new: Path, target: Path) -> None:
    """Let a folder take the place of another, so that pictures of two choices never lie side by side."""
    old = target.with_name(f"{target.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
