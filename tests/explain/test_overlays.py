"""What each mask of an image changes is what leaving it out changes, and the best mask is the best by hand."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from pipeline.explain import overlays
from pipeline.explain.explain import explain
from pipeline.model.backbones import standardise
from pipeline.model.overlay import Overlay, OverlayOptions
from pipeline.model.tasks import probabilities
from pipeline.model.uses import Seen
from pipeline.train.finished_run import Trained
from pipeline.train.train import Machine
from tests.train.scenes import PLAIN, do, make_dataset, make_store

SIDE = 32


class Masked:
    """Images whose lesion is the square that the largest mask is, moved by two pixels."""

    def __init__(self, source):
        self._source = source

    def read(self, index):
        return self._source.read(index)

    def stamp(self, index):
        return None

    def mask(self, index):
        mask = np.zeros((16, 16), bool)
        mask[2:10, 4:12] = True
        return mask


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """A run on images with three masks each, but the last, which has none."""
    dataset = make_dataset()
    dataset = dataclasses.replace(dataset, source=Masked(dataset.source))
    maps = np.zeros((len(dataset.samples), 1, SIDE, SIDE))
    maps[:-1, 0, 4:20, 4:20] = 1
    maps[:-1, 0, 6:10, 6:10] = 2
    maps[:-1, 0, 24:30, 24:30] = 3
    folder = tmp_path_factory.mktemp("painted")
    store = make_store(
        folder / "m.zarr", dataset, taps={"masks": (1, SIDE, SIDE)}, dtype="uint8", features={"masks": maps}
    )
    do(dataset, store, folder / "run", model=dataclasses.replace(PLAIN, overlay=OverlayOptions()))
    return folder / "run", dataset, store


def test_without_a_mask_the_classifier_says_what_it_says_of_an_image_painted_without_it(painted):
    folder, dataset, store = painted
    trained = Trained(folder, dataset, store, machine=Machine())
    feed, classifier = trained.feed("test"), trained.classifier
    taken = overlays.take_apart(classifier, trained.description.head, feed, 0, store)
    image = torch.from_numpy(dataset.read(dataset.indices("test")[0])).permute(2, 0, 1)[None]
    ranks = torch.from_numpy(store.read([feed.rows[0]])["masks"])
    assert classifier.overlay is not None

    def say(maps):
        seen = standardise(classifier.overlay.on_images(image, Seen({"masks": maps})).float())
        return probabilities(trained.description.head, classifier(seen, {}).double())[0].detach().numpy()

    np.testing.assert_allclose(taken.probabilities, say(ranks), atol=1e-6)
    np.testing.assert_allclose(taken.plain, say(torch.zeros_like(ranks)), atol=1e-6)
    assert [mask.rank for mask in taken.masks] == [1, 2, 3]
    for mask in taken.masks:
        without = ranks.clone()
        without[without == mask.rank] = 0
        np.testing.assert_allclose(mask.probabilities, say(without), atol=1e-6)
        assert np.isnan(mask.predicted_iou)
    assert taken.masks[1].share == pytest.approx(4 / 256)
    said = overlays.spell(taken, dataset.class_names)
    assert said["masks"][0]["change"] == pytest.approx(max(taken.probabilities) - max(
        taken.masks[0].probabilities[taken.probabilities.argmax()], 0
    ))  # fmt: skip
    nothing = overlays.take_apart(classifier, trained.description.head, feed, len(feed) - 1, store)
    assert nothing.masks == ()
    np.testing.assert_allclose(nothing.probabilities, nothing.plain)


@pytest.mark.parametrize("palette", ["rank", "random"])
def test_leaving_a_mask_out_changes_nothing_beside_it(painted, monkeypatch, palette):
    folder, dataset, store = painted
    trained = Trained(folder, dataset, store, machine=Machine())
    shown, classifier = [], trained.classifier
    monkeypatch.setattr(classifier, "overlay", Overlay(OverlayOptions(palette=palette), classifier.taps, 16))
    classifier.register_forward_pre_hook(lambda module, given: shown.append(given[0]))
    taken = overlays.take_apart(classifier, trained.description.head, trained.feed("test"), 0, store)
    full, plain, *without = torch.cat(shown)
    for mask, image in zip(taken.masks, without, strict=True):
        left_out = torch.from_numpy(taken.ranks == mask.rank)
        beside = torch.nn.functional.max_pool2d(left_out[None].float(), 3, 1, 1)[0] == 0  # beyond any outline
        assert torch.equal(image[:, beside], full[:, beside])
        assert not torch.equal(image[:, left_out], full[:, left_out])
    assert not torch.equal(full, plain)


def test_the_best_overlap_by_hand():
    ranks = np.zeros((10, 10), int)
    ranks[0:4, 0:5] = 1
    ranks[6:8, 0:5] = 2
    lesion = np.zeros((10, 10), bool)
    lesion[0:2, 0:5] = True
    assert overlays.best_iou(ranks, lesion) == 10 / 20
    assert overlays.best_iou(np.zeros((10, 10), int), lesion) == 0
    lesion[0:4, 0:5] = True
    assert overlays.best_iou(ranks, lesion) == 1


def test_explain_leaves_pictures_numbers_and_a_table(painted):
    folder, dataset, store = painted
    found = explain(folder, dataset, store, count=2, resamples=50)["overlay"]
    written = json.loads((folder / "explain/explain.json").read_text())["overlay"]
    assert written == found
    assert (found["images"], found["without_masks"], found["tap"]) == (12, 1, "masks")
    lesion, largest = 8 * 8, 8 * 8 - 2 * 2  # on the lesion's pixels; a smaller mask lies on the largest
    both = 8 * 6 - 2 * 1  # rows 2 to 9 of columns 4 to 9, less what the smaller one takes of them: 3 to 4 of 4
    expected = both / (lesion + largest - both)
    table = (folder / "explain/masks_samples.csv").read_text().splitlines()
    ious = [float(line.rsplit(",", 1)[1]) for line in table[1:]]
    assert ious[:-1] == pytest.approx([expected] * 11)
    assert ious[-1] == 0
    assert found["localisation"]["best_iou"]["value"] == pytest.approx(np.mean(ious))
    assert found["localisation"]["recall"]["value"] == pytest.approx(np.mean(np.array(ious) > 0.5))
    for case in found["cases"]:
        assert (folder / "explain" / case["file"]).stat().st_size > 1000
        assert case["id"] in case["alt"]
    assert {mask["rank"] for case in found["cases"] for mask in case["masks"]} == {1, 2, 3}


def test_explain_reads_each_lesion_once_for_the_maps_and_once_for_the_masks(painted, monkeypatch):
    folder, dataset, store = painted
    read = []
    monkeypatch.setattr(
        Masked, "mask", lambda self, index, known=Masked.mask: (read.append(index), known(self, index))[1]
    )
    found = explain(folder, dataset, store, count=1, resamples=20)
    drawn = {image["id"] for image in found["images"]}
    rest = [index for index in dataset.indices("test") if dataset.samples[index].id not in drawn]
    assert len(rest) > 8
    assert [read.count(index) for index in rest] == [2] * len(rest)


def test_a_run_without_an_overlay_has_no_such_part(painted, tmp_path):
    _, dataset, _ = painted
    do(dataset, None, tmp_path / "run", model=PLAIN)
    assert "overlay" not in explain(tmp_path / "run", dataset, None, count=1, resamples=20)
