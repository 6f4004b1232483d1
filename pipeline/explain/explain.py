"""Where a finished run looked on a split: a picture per sample, a contact sheet, and how well it finds the lesion."""

from __future__ import annotations

import difflib
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cache import Store
from pipeline import records
from pipeline.data import Dataset, Split
from pipeline.errors import ConfigError, RunError
from pipeline.explain import heat as heat_maps
from pipeline.explain import localise, overlays
from pipeline.explain.gallery import Gallery, judge
from pipeline.explain.heat import GRAD_CAM
from pipeline.explain.localise import Masks
from pipeline.explain.pictures import draw_masks
from pipeline.model.classifier import Classifier
from pipeline.progress import Progress, silent
from pipeline.train import trained_model
from pipeline.train.feeding.feed import Feed
from pipeline.train.finished_run import Trained
from pipeline.train.painted import count_masks
from pipeline.train.train import Machine

FOLDER = "explain"


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
    if not trained_model.load_description(folder).model.reads_images:
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
    verdicts = judge(dataset.task, feed, heat, dataset.class_names)
    gallery = Gallery(dataset, feed, heat, verdicts, lesions, split, trained.classifier.overlay)
    scratch = _fresh(folder / f"{FOLDER}-partial")
    kept, cells = localise.cover(lesions, gallery.indices, machine.workers)
    found: dict[str, Any] = {
        "split": split,
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        **gallery.draw(scratch, chosen, count, progress),
        "ranges": {name: dict(zip(("low", "high"), gallery.ranges[name], strict=True)) for name in gallery.ranges},
        "localisation": _localise(
            scratch,
            gallery,
            trained.classifier,
            feed,
            kept,
            cells,
            resamples=resamples,
            seed=seed,
            progress=progress,
        ),
    }
    if trained.classifier.overlay is not None and store is not None:
        found["overlay"] = _explain_overlay(
            scratch, gallery, trained, store, found["images"], kept, resamples=resamples, seed=seed,
            workers=machine.workers, progress=progress,
        )  # fmt: skip
    records.write_json(scratch / "explain.json", found)
    _swap(scratch, folder / FOLDER)
    return found


def _explain_overlay(
    folder: Path,
    gallery: Gallery,
    trained: Trained,
    store: Store,
    images: Sequence[Mapping[str, Any]],
    kept: Sequence[int],
    *,
    resamples: int,
    seed: int,
    workers: int,
    progress: Progress,
) -> dict[str, Any]:
    """Say and draw what each mask of the drawn images changes, and score the masks where lesions are known."""
    classifier, feed = trained.classifier, gallery.feed
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
        draw_masks(folder / file, gallery.case(position, [GRAD_CAM]), said["said"], bars, rest)
        cases.append(
            {"id": image["id"], "true": image["true"], "file": file, "alt": _alt_of_masks(image, said), **said}
        )
        progress("leave masks out", done, len(images))
    found: dict[str, Any] = {**asdict(classifier.overlay.options), **count_masks(classifier, feed), "cases": cases}
    if not kept:
        return {**found, "localisation": None}
    best = overlays.best_overlaps(
        classifier.overlay,
        feed,
        kept,
        lambda i: gallery.masks(gallery.indices[i]),
        workers=workers,
        progress=progress,
    )
    rows = [
        {"id": feed.ids[i], "group": feed.groups[i], "best_iou": float(iou)} for i, iou in zip(kept, best, strict=True)
    ]
    records.write_csv(folder / "masks_samples.csv", rows)
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
    gallery: Gallery,
    classifier: Classifier,
    feed: Feed,
    kept: Sequence[int],
    cells: localise.Cells,
    *,
    resamples: int,
    seed: int,
    progress: Progress,
) -> dict[str, Any] | None:
    """Score the maps against the masks, and write the tables; None where no lesion is known."""
    if not kept:
        return None
    scores = localise.score_maps(gallery.heat, kept, cells, feed.groups, progress)
    share = cells.mean(axis=(1, 2), dtype=np.float64)
    groups = [feed.groups[position] for position in kept]
    found = localise.summarise(scores, share, groups, resamples=resamples, seed=seed)
    rows = [
        {"map": name, "score": score, **value, "chance": found["chance"].get(score, "")}
        for name, values in found["maps"].items()
        for score, value in values.items()
    ]
    records.write_csv(folder / "localisation.csv", rows)
    by_sample = [
        {"id": feed.ids[kept[row]], "group": groups[row], "map": name, "share": float(share[row])}
        | {score: float(column[row]) for score, column in values.items() if score in found["maps"][name]}
        for row in range(len(kept))
        for name, values in scores.items()
    ]
    records.write_csv(folder / "localisation_samples.csv", by_sample)
    untrained = localise.score_untrained(classifier, feed, kept, cells)
    return {**found, "untrained_auc": untrained, "left_out": len(feed) - len(kept)}


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
    paths = map(PurePosixPath, (name, sample_id))
    ours, theirs = (path.with_suffix("").parts if path.name else () for path in paths)
    shorter = min(len(ours), len(theirs))
    return shorter > 0 and ours[-shorter:] == theirs[-shorter:]


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
