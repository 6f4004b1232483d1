"""How well a map finds the lesion: by hand, against scikit-learn, and at chance where there is nothing to find."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import sklearn.metrics
from PIL import Image

from pipeline.data.layouts.files import Files
from pipeline.errors import DataError
from pipeline.explain.localise import Masks, _partners, score_map, summarise
from tests.explain.conftest import lesion_dataset

LESION = np.array([[1, 1], [0, 0], [0, 0]], np.float32)


def test_scores_by_hand():
    values = np.array([[0.8, 0.4], [0.4, 0.2], [0.1, 0.1]])
    found = score_map(values, LESION)
    assert found["mass"] == pytest.approx(1.2 / 2.0)
    assert found["lift"] == pytest.approx(0.6 / (1 / 3))
    assert found["pointing"] == 1
    assert found["auc"] == pytest.approx((4 + 3.5) / 8)
    assert np.isnan(found["auc_elsewhere"])


def test_a_constant_map_gets_what_chance_gets_for_all_its_rounding():
    noise = 1e-8 * np.random.default_rng(0).standard_normal((40, 40))
    cover = np.zeros((40, 40))
    cover[5:9, 30:] = 1
    for values in (0.5 + noise, np.zeros((40, 40))):
        found = score_map(values, cover, cover)
        assert found == pytest.approx(
            {"mass": 0.025, "lift": 1, "pointing": 0.025, "auc": 0.5, "auc_elsewhere": 0.5}, abs=1e-9
        )


def test_auc_is_that_of_scikit_learn_and_turns_with_the_map():
    random = np.random.default_rng(0)
    values = random.random((30, 20)).round(2)  # with ties
    cover = (random.random((30, 20)) < values * 0.6).astype(np.float32)
    auc = score_map(values, cover)["auc"]
    assert auc == pytest.approx(sklearn.metrics.roc_auc_score(cover.ravel(), values.ravel()), abs=1e-12)
    assert auc > 0.6
    assert score_map(1 - values, cover)["auc"] == pytest.approx(1 - auc, abs=1e-12)


def test_a_cell_that_is_partly_lesion_counts_in_part():
    values = np.array([[4.0, 2.0, 1.0, 1.0]])
    found = score_map(values, np.array([[0.5, 1.0, 0.0, 0.0]]))
    assert found["mass"] == pytest.approx(4 / 8)
    assert found["pointing"] == 0.5
    weights = [0.5, 0.5, 1, 1, 1]  # the first cell is half lesion and half not
    expected = sklearn.metrics.roc_auc_score([1, 0, 1, 0, 0], [4, 4, 2, 1, 1], sample_weight=weights)
    assert found["auc"] == pytest.approx(expected, abs=1e-12)


def test_intervals_draw_patients_as_a_slow_loop_does():
    random = np.random.default_rng(0)
    patients = np.repeat(np.arange(20), 3)
    auc = random.standard_normal(20)[patients] + 0.1 * random.standard_normal(60)
    scores = {"gate": {"auc": auc, "auc_elsewhere": np.full(60, np.nan)}}
    groups = [f"p{patient}" for patient in patients]
    found = summarise(scores, np.full(60, 0.25), groups, resamples=4000)
    assert (found["images"], found["groups"]) == (60, 20)
    assert found["chance"] == {"mass": 0.25, "lift": 1.0, "pointing": 0.25, "auc": 0.5}
    assert found["maps"]["gate"].keys() == {"auc"}  # no other image, no score
    value = found["maps"]["gate"]["auc"]
    means = []
    for _ in range(4000):
        drawn = random.integers(0, 20, 20)
        means.append(np.mean([auc[patients == patient] for patient in drawn]))
    assert value["value"] == pytest.approx(auc.mean())
    assert (value["low"], value["high"]) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)
    alone = summarise(scores, np.full(60, 0.25), [str(i) for i in range(60)], resamples=4000)["maps"]["gate"]["auc"]
    assert value["high"] - value["low"] > 1.4 * (alone["high"] - alone["low"])


def write_masks(folder, dataset, names):
    for index, name in names.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dataset.mask(index).astype(np.uint8)).save(file)  # 1 is lesion: not zero is enough


def named(*ids):
    """A data set whose first samples are called so, in place of `ward/p00_0.png` and its like."""
    dataset = lesion_dataset()
    first = [dataclasses.replace(sample, id=name) for sample, name in zip(dataset.samples, ids, strict=False)]
    return dataclasses.replace(dataset, samples=(*first, *dataset.samples[len(first) :]))


@pytest.mark.parametrize("suffix", [".png", "_segmentation.png", "_mask.PNG", "_mask_1.bmp", ".tiff"])
@pytest.mark.parametrize("name", ["ward/{}", "{}", "elsewhere/deep/{}"])
def test_masks_are_found_by_the_name_of_the_sample(tmp_path, name, suffix):
    dataset = lesion_dataset()
    write_masks(tmp_path, dataset, {i: name.format(dataset.samples[i].id[5:-4]) + suffix for i in (0, 7)})
    masks = Masks(dataset, tmp_path)
    for index in (0, 7):
        np.testing.assert_array_equal(masks(index), dataset.mask(index))
    assert masks(1) is None


@pytest.mark.parametrize(("image", "mask"), [("ISIC_0000000.jpg", "ISIC_0000000_segmentation.png"),
                                             ("benign/benign (1).png", "benign (1)_mask.png")])  # fmt: skip
def test_masks_of_public_data_sets_are_found(tmp_path, image, mask):
    dataset = named(image)
    write_masks(tmp_path, dataset, {0: mask})
    np.testing.assert_array_equal(Masks(dataset, tmp_path)(0), dataset.mask(0))


def test_a_mask_goes_to_the_longest_name_that_it_begins_with(tmp_path):
    dataset = named("a", "a_1", "a_left", "b", "c.png", "c.jpg")
    files = ["a_1.png", "a_left_mask.png", "b_1.png", "b_two_words.png", "bmask.png", "c_mask.png"]
    write_masks(tmp_path, dataset, dict(enumerate(files)))
    masks = Masks(dataset, tmp_path)
    np.testing.assert_array_equal(masks(1), dataset.mask(0))
    np.testing.assert_array_equal(masks(2), dataset.mask(1))
    for index in (0, 3, 4, 5):  # no file of its own, none with one word after its name, and two samples of one name
        assert masks(index) is None
    write_masks(tmp_path, dataset, {0: "a_mask.png", 1: "a_1_mask.png"})
    (tmp_path / "a_1.png").unlink()
    masks = Masks(dataset, tmp_path)
    np.testing.assert_array_equal(masks(0), dataset.mask(0))
    np.testing.assert_array_equal(masks(1), dataset.mask(1))


@pytest.mark.parametrize(
    "both",
    [
        ("p00_0.png", "p00_0_mask.png"),
        ("p00_0_mask.png", "p00_0_mask_1.png"),
        ("p00_0.png", "p00_0.tif"),
        ("x/p00_0.png", "y/p00_0.png"),
        ("ward/p00_0_a.png", "ward/p00_0_b.png"),
    ],
)
def test_two_masks_of_one_sample_are_refused_with_their_names(tmp_path, both):
    dataset = lesion_dataset()
    for name in both:
        write_masks(tmp_path, dataset, {0: name})
    with pytest.raises(DataError, match="leave one file per sample") as caught:
        Masks(dataset, tmp_path)
    for said in (*(str(tmp_path / name) for name in both), "'ward/p00_0.png'"):
        assert said in str(caught.value)


def test_a_mask_where_the_name_of_the_sample_says_is_taken_before_one_elsewhere(tmp_path):
    dataset = lesion_dataset()
    write_masks(tmp_path, dataset, {0: "ward/p00_0_mask.png", 1: "other/p00_0_mask.png"})
    np.testing.assert_array_equal(Masks(dataset, tmp_path)(0), dataset.mask(0))


def test_images_beside_their_masks_are_no_masks(tmp_path):
    dataset = lesion_dataset()
    names = tuple(sample.id for sample in dataset.samples)
    write_masks(tmp_path, dataset, dict(enumerate(names)))
    dataset = dataclasses.replace(dataset, source=Files(tmp_path, names))
    with pytest.raises(DataError, match="is named as a sample"):
        Masks(dataset, tmp_path)
    write_masks(tmp_path, lesion_dataset(), {3: "ward/p01_1_mask.png"})
    np.testing.assert_array_equal(Masks(dataset, tmp_path)(3), lesion_dataset().mask(3))


def test_masks_of_sixteen_bits_and_of_jpeg(tmp_path):
    dataset = lesion_dataset()
    Image.fromarray(dataset.mask(0).astype(np.uint16)).save(tmp_path / "p00_0.tif")
    Image.fromarray(dataset.mask(1).astype(np.uint8) * 255).save(tmp_path / "p00_1.jpg", quality=75)
    masks = Masks(dataset, tmp_path)
    for index in (0, 1):
        np.testing.assert_array_equal(masks(index), dataset.mask(index))


def test_a_folder_without_masks_says_what_they_would_be_called(tmp_path):
    would = "'ward/p00_0.png' would be 'ward/p00_0.png' or 'ward/p00_0_mask.png'"
    with pytest.raises(DataError, match=rf"none of its 0 image files .* {would}"):
        Masks(lesion_dataset(), tmp_path)
    with pytest.raises(DataError, match="there is no such folder"):
        Masks(lesion_dataset(), tmp_path / "nothing")


def test_a_mask_of_another_size_is_refused(tmp_path):
    dataset = lesion_dataset()
    Image.fromarray(np.ones((12, 16), np.uint8)).save(tmp_path / "p00_0.png")
    with pytest.raises(DataError, match="the mask is 12 x 16 and its image 24 x 32"):
        Masks(dataset, tmp_path)(0)


def test_elsewhere_is_another_patient():
    assert _partners(["p0", "p0", "p1", "p1", "p0"]) == [2, 2, 4, 4, 2]
    assert _partners(["p0", "p0"]) is None
