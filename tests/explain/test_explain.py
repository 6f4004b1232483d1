"""The folder of pictures of a run: what is in it, whom it shows, and that two choices never mix."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import Sample
from pipeline.errors import ConfigError, DataError, RunError
from pipeline.evaluate.evaluate import evaluate
from pipeline.explain.explain import explain
from pipeline.explain.gallery import file_name
from pipeline.explain.pictures import varies
from pipeline.train import trained_model
from pipeline.train.train import train
from tests.explain.conftest import GATED, HEIGHT, PLAIN, WIDTH, knowing_run, knowing_store, lesion_dataset
from tests.train.scenes import QUICK

QUICKLY = {"resamples": 200, "count": 2}


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_an_oracle_gate_finds_the_lesion_and_grad_cam_of_noise_does_not(lesions, lesion_store, oracle_run):
    found = explain(oracle_run, lesions, lesion_store, **QUICKLY)
    localisation = found["localisation"]
    assert (localisation["images"], localisation["groups"], localisation["left_out"]) == (12, 6, 0)
    assert localisation["chance"]["mass"] == pytest.approx(1 / 12)
    gate = localisation["maps"]["neck → stage4"]
    assert gate["auc"]["low"] > 0.97
    assert gate["pointing"]["value"] > 0.95
    assert 1.02 < gate["lift"]["low"] <= gate["lift"]["value"] < 1.06  # a gate in .5 to .525: the mass hardly tells
    assert gate["auc_elsewhere"]["value"] < 0.75
    untrained = localisation["untrained_auc"]["neck → stage4"]
    assert len(untrained) == 5 == len(set(untrained))
    assert max(abs(auc - 0.5) for auc in untrained) > 0.4  # features that know need no training to show it
    centre = localisation["maps"]["centre of the image"]
    assert abs(centre["auc"]["value"] - 0.5) < 0.2
    with (oracle_run / "explain" / "localisation.csv").open() as file:
        rows = {(row["map"], row["score"]): row for row in csv.DictReader(file)}
    assert float(rows["neck → stage4", "auc"]["value"]) == gate["auc"]["value"]
    assert rows["neck → stage4", "auc"]["chance"] == "0.5"
    with (oracle_run / "explain" / "localisation_samples.csv").open() as file:
        aucs = [float(row["auc"]) for row in csv.DictReader(file) if row["map"] == "neck → stage4"]
    assert np.mean(aucs) == pytest.approx(gate["auc"]["value"])


def test_a_gate_that_avoids_the_lesion_is_below_chance(lesions, lesion_store, oracle_run, tmp_path):
    turned = knowing_run(tmp_path / "run", lesions, lesion_store, sign=-1.0)
    high, low = (
        explain(folder, lesions, lesion_store, **QUICKLY)["localisation"]["maps"]["neck → stage4"]
        for folder in (oracle_run, turned)
    )
    assert low["auc"]["high"] < 0.03
    assert low["auc"]["value"] == pytest.approx(1 - high["auc"]["value"], abs=1e-3)
    assert low["lift"]["high"] < 1


def test_the_folder_holds_what_the_report_says(lesions, lesion_store, gated_run):
    found = explain(gated_run, lesions, lesion_store, **QUICKLY)
    folder = gated_run / "explain"
    assert json.loads((folder / "explain.json").read_text()) == found
    files = {image["file"] for image in found["images"]}
    tables = {"sheet.png", "explain.json", "localisation.csv", "localisation_samples.csv"}
    assert {path.name for path in folder.iterdir()} == files | tables | {"strips"}
    for name in {*files, "sheet.png"}:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 380
            assert np.asarray(picture.convert("L")).std() > 10
    for image in found["images"]:
        assert image["id"] in image["alt"]
        assert f"said {image['predicted']} with probability {image['probability']:.2f}" in image["alt"]
        told = [f"{name} ({varies(*found['ranges'][name].values())})" for name in [*found["ranges"]][:3]]
        assert f"{', '.join(told)}, Grad-CAM" in image["alt"]
    assert "Contact sheet of the test images" in found["sheet"]["alt"]
    hits, misses = found["sheet"]["strips"].values()
    assert [[strip["id"] for strip in block] for block in (hits, misses)] == [
        found["sheet"][name] for name in ("hits", "misses")
    ]
    for strip in hits + misses:
        ends, colours = found["ranges"]["mean of the gates"], strip["colours"]
        words = varies(ends["low"], ends["high"])
        assert colours["mean of the gates, 0 to 1"] == {"low": 0, "high": 1, "own": False, "words": ""}
        assert colours["mean of the gates, stretched"] == {**ends, "own": False, "words": words}
        assert colours["Grad-CAM"]["own"]
        assert strip["colours"]["Grad-CAM"]["low"] == 0
        assert strip["alt"].endswith(f"beside it heat maps of mean of the gates ({words}), Grad-CAM.")
        with Image.open(folder / strip["file"]) as picture:
            width, height = picture.size
            assert height / width == pytest.approx(4.09 * HEIGHT / WIDTH, rel=0.03)  # image and three maps
            assert np.asarray(picture.convert("L")).std() > 10
    assert {path.name for path in (folder / "strips").iterdir()} == {Path(s["file"]).name for s in hits + misses}
    assert found["ranges"].keys() == {"early → stage1", "neck → stage4", "mean of the gates", "Grad-CAM"}
    weights = hashlib.sha256((gated_run / "model.safetensors").read_bytes()).hexdigest()
    assert found["weights_sha256"] == weights


def test_the_sheet_shows_the_surest_hits_and_the_worst_misses(lesions, lesion_store, gated_run):
    evaluate(gated_run, lesions, lesion_store, resamples=10)
    with (gated_run / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    truth = {row["id"]: float(row[f"p_{row['label']}"]) for row in rows}
    right = {row["id"]: row["label"] == row["predicted"] for row in rows}
    hits = sorted((i for i in truth if right[i]), key=lambda i: -truth[i])
    misses = sorted((i for i in truth if not right[i]), key=lambda i: truth[i])
    assert len(hits) > 2 <= len(misses)
    found = explain(gated_run, lesions, lesion_store, **QUICKLY)
    assert (found["sheet"]["hits"], found["sheet"]["misses"]) == (hits[:2], misses[:2])
    assert [image["id"] for image in found["images"]] == [*hits[:2], *misses[:2]]
    for image in found["images"]:
        (row,) = [row for row in rows if row["id"] == image["id"]]
        assert (image["true"], image["predicted"]) == (row["label"], row["predicted"])
        assert image["probability"] == pytest.approx(float(row[f"p_{row['predicted']}"]))


@pytest.fixture(scope="module")
def seeing_run(gated_run, tmp_path_factory):
    """A run with two gates of which none is flat: the one of `neck` rises with the lesion's part of a cell."""
    folder = shutil.copytree(gated_run, tmp_path_factory.mktemp("seeing") / "run")
    state = trained_model.load_classifier(folder)[0].state_dict()
    for number in range(2):
        for name, value in (("squeeze", 0.0), ("excite", 0.1)):
            state[f"gates.{number}.{name}.weight"].fill_(value)
            state[f"gates.{number}.{name}.bias"].zero_()
        state[f"gates.{number}.squeeze.weight"][:, 0] = 1
    trained_model.save_weights(folder / "model.safetensors", state)
    trained_model.save_description(folder, trained_model.load_description(folder))  # names the weights by their digest
    return folder


def layers(axes):
    """The arrays that axes show, from the lowest to the highest, each over the whole of the image."""
    assert len({tuple(layer.get_extent()) for layer in axes.images}) == 1
    left, right, bottom, top = axes.images[0].get_extent()
    assert (left, right, bottom, top) == (0, WIDTH, HEIGHT, 0)
    assert (axes.get_xlim(), axes.get_ylim()) == ((left, right), (bottom, top))
    return axes.images


def test_a_picture_shows_every_gate_their_mean_and_grad_cam_over_the_image(lesions, lesion_store, seeing_run, figures):
    found = explain(seeing_run, lesions, lesion_store, **QUICKLY)
    maps = ["early → stage1", "neck → stage4", "mean of the gates", "Grad-CAM"]
    place = {sample.id: index for index, sample in enumerate(lesions.samples)}
    for image in found["images"]:
        figure = figures[image["file"]]
        name, truth, said = figure.get_suptitle().replace("   ", "\n").split("\n")
        assert (name, truth) == (image["id"], f"true: {image['true']}")
        verdict = "right" if image["true"] == image["predicted"] else "wrong"
        assert said == f"predicted: {image['predicted']} ({image['probability']:.0%}, {verdict})"
        panels = {axes.get_title(): axes for axes in figure.axes if axes.images}
        ranges = {name: tuple(ends.values()) for name, ends in found["ranges"].items()}
        twice = [(f"{m}, 0 to 1", f"{m}, stretched\n{varies(*ranges[m])}") for m in maps[:3]]
        assert [*panels] == ["image, lesion outlined", *(title for pair in twice for title in pair), "Grad-CAM"]
        pixels = lesions.read(place[image["id"]])
        (shown,) = layers(panels.pop("image, lesion outlined"))
        np.testing.assert_array_equal(shown.get_array(), pixels)
        heat = {}
        for shown_as, axes in panels.items():
            _, below, over = layers(axes)
            np.testing.assert_array_equal(below.get_array(), pixels.mean(axis=2))
            title, _, scale = shown_as.partition(", ")
            heat[title] = np.asarray(over.get_array())
            assert heat[title].shape == (HEIGHT, WIDTH)
            assert np.ptp(heat[title]) > 1e-3
            assert 0.3 < over.get_alpha() < 1  # the image is to be seen through it
            low, high = (0, 1) if scale == "0 to 1" else ranges[title]
            if title == "Grad-CAM":
                low, high = 0, heat[title].max()
            assert over.get_clim() == pytest.approx((low, high))
        np.testing.assert_allclose(heat[maps[2]], (heat[maps[0]] + heat[maps[1]]) / 2, atol=1e-6)
        assert not np.allclose(heat[maps[0]], heat[maps[1]])


def test_heat_lies_where_the_lesion_is(lesions, lesion_store, oracle_run, figures):
    found = explain(oracle_run, lesions, lesion_store, **QUICKLY)
    place = {sample.id: index for index, sample in enumerate(lesions.samples)}
    for image in found["images"]:
        (axes,) = (axes for axes in figures[image["file"]].axes if axes.get_title() == "neck → stage4, 0 to 1")
        _, _, over = layers(axes)  # above the image and its grey levels
        heat, mask = np.asarray(over.get_array()), lesions.mask(place[image["id"]])
        assert mask[np.unravel_index(heat.argmax(), heat.shape)]
        outlines = [path for line in axes.collections for path in line.get_paths()]
        assert outlines
        for path in outlines:
            rows, columns = np.nonzero(mask)
            assert path.get_extents().extents == pytest.approx(
                (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), abs=0.51
            )


def test_the_sheet_labels_what_it_shows(lesions, lesion_store, seeing_run, figures):
    found = explain(seeing_run, lesions, lesion_store, **QUICKLY)
    known = {image["id"]: image for image in found["images"]}
    hits, misses = figures["sheet.png"].subfigs
    assert re.fullmatch(r"Surest hits \(\d+ of 12 test images are right\)", hits.get_suptitle())
    assert re.fullmatch(r"Worst misses \(\d+ of 12 are wrong\)", misses.get_suptitle())
    for part, ids in ((hits, found["sheet"]["hits"]), (misses, found["sheet"]["misses"])):
        panels = [axes for axes in part.axes if axes.images]
        images, mean, stretched, cam = (panels[k::4] for k in range(4))  # a column for each sample
        assert [axes.get_xlabel() for axes in cam] == ids
        assert [axes.get_title() for axes in images] == [
            f"true {known[i]['true']}\nsaid {known[i]['predicted']}\n{known[i]['probability']:.0%}" for i in ids
        ]
        for axes in images:
            assert len(layers(axes)) == 1
        for axes in (*mean, *stretched, *cam):
            _, _, over = layers(axes)
            heat = np.asarray(over.get_array())
            assert heat.shape == (HEIGHT, WIDTH)
            assert np.ptp(heat) > 1e-3
        assert [axes.get_ylabel() for axes in part.axes if axes.get_ylabel()] == [
            "mean of the gates\n0 to 1",
            f"mean of the gates\nstretched\n{varies(*found['ranges']['mean of the gates'].values())}",
            "Grad-CAM",
        ]


def test_again_gives_the_same_bytes_and_another_choice_nothing_of_the_last(lesions, lesion_store, gated_run):
    explain(gated_run, lesions, lesion_store, **QUICKLY)
    folder = gated_run / "explain"
    first = digests(folder)
    (gated_run / "explain-partial").mkdir()
    (gated_run / "explain-partial" / "half.png").write_bytes(b"what a killed process left")
    explain(gated_run, lesions, lesion_store, **QUICKLY)
    assert digests(folder) == first
    other = explain(gated_run, lesions, lesion_store, names=["ward/p00_1.png"], split="train", **QUICKLY)
    assert [image["id"] for image in other["images"]] == ["ward/p00_1.png"]
    assert {image["file"] for image in other["images"]} == {
        path.name for path in folder.glob("*.png") if path.name != "sheet.png"
    }
    assert not [path for path in gated_run.glob("explain*") if path.name != "explain"]


def test_a_sheet_without_misses(lesions, lesion_store, gated_run):
    """A run is told that whatever it says is true."""
    explain(gated_run, lesions, lesion_store, **QUICKLY)
    evaluate(gated_run, lesions, lesion_store, resamples=10)
    with (gated_run / "predictions.csv").open() as file:
        said = {row["id"]: lesions.class_names.index(row["predicted"]) for row in csv.DictReader(file)}
    agreed = dataclasses.replace(
        lesions, samples=tuple(dataclasses.replace(s, label=said.get(s.id, s.label)) for s in lesions.samples)
    )
    found = explain(gated_run, agreed, lesion_store, **QUICKLY)
    assert found["sheet"]["misses"] == []
    assert len(found["sheet"]["hits"]) == 2
    assert "0 worst of 0 misses" in found["sheet"]["alt"]


@pytest.mark.parametrize(("task", "classes"), [("multilabel", 3), ("ordinal", 4), ("multiclass", 3)])
def test_every_task_has_pictures(tmp_path, task, classes):
    dataset = lesion_dataset(task, classes, counts=(24, 12, 12))
    store = knowing_store(tmp_path / "s.zarr", dataset)
    train(dataset, store, tmp_path / "run", model=GATED, options=dataclasses.replace(QUICK, epochs=1))
    found = explain(tmp_path / "run", dataset, store, **QUICKLY)
    names = {"|".join(dataset.class_names[: k + 1]) for k in range(classes)} | {
        *dataset.class_names,
        "none",
        "a|c",
        "b|c",
    }
    for image in found["images"]:
        assert {image["true"], image["predicted"]} <= names
        assert 0 <= image["probability"] <= 1
    assert found["localisation"]["maps"].keys() >= {"neck → stage4", "Grad-CAM"}


def test_the_plain_classifier_has_grad_cam(lesions, tmp_path):
    train(lesions, None, tmp_path, model=PLAIN, options=dataclasses.replace(QUICK, epochs=1))
    found = explain(tmp_path, lesions, None, **QUICKLY)
    assert found["localisation"]["maps"].keys() == {"Grad-CAM", "centre of the image"}
    assert "heat maps of Grad-CAM." in found["images"][0]["alt"]


def test_without_masks_there_are_pictures_and_no_score(lesions, lesion_store, gated_run):
    blind = dataclasses.replace(lesions, source=dataclasses.replace(lesions.source, masks=[None] * len(lesions)))
    found = explain(gated_run, blind, lesion_store, **QUICKLY)
    assert found["localisation"] is None
    assert not [path for path in (gated_run / "explain").iterdir() if "localisation" in path.name]
    assert "outlined" not in found["images"][0]["alt"]


def test_a_folder_of_masks_gives_the_score_of_the_samples_it_knows(lesions, lesion_store, oracle_run, tmp_path):
    for index in lesions.indices("test")[:5]:
        name = lesions.samples[index].id.split("/")[1]
        Image.fromarray(lesions.mask(index).astype(np.uint8) * 255).save(tmp_path / name)
    found = explain(oracle_run, lesions, lesion_store, masks=tmp_path, **QUICKLY)["localisation"]
    assert (found["images"], found["left_out"]) == (5, 7)
    assert found["maps"]["neck → stage4"]["auc"]["value"] > 0.97


@pytest.mark.parametrize("name", ["ward/p15_0.png", "p15_0.png", "p15_0", "data/ward/p15_0.png"])
def test_a_sample_is_found_as_people_name_it(lesions, lesion_store, gated_run, name):
    found = explain(gated_run, lesions, lesion_store, names=[name], **QUICKLY)
    assert [image["id"] for image in found["images"]] == ["ward/p15_0.png"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("p00_0", "'p00_0' is in split 'train', not in 'test': name it with --split"),
        ("p15_O.png", "There is no sample 'p15_O.png' in split 'test': ids look like 'ward/p15_"),
    ],
)
def test_a_name_of_nobody_is_refused(lesions, lesion_store, gated_run, name, message):
    with pytest.raises(ConfigError, match=message):
        explain(gated_run, lesions, lesion_store, names=[name], **QUICKLY)


def test_a_name_of_two_is_refused(lesions, lesion_store, gated_run):
    doubled = tuple(
        dataclasses.replace(s, id=s.id.replace("ward/p16_0", "hall/p15_0")) if s.split == "test" else s
        for s in lesions.samples
    )
    with pytest.raises(ConfigError, match=r"'p15_0' may be 'ward/p15_0\.png' or 'hall/p15_0\.png'"):
        explain(gated_run, dataclasses.replace(lesions, samples=doubled), lesion_store, names=["p15_0"])


def test_other_classes_are_refused(lesions, lesion_store, gated_run):
    with pytest.raises(RunError, match=r"knows the binary classes \['a', 'b'\]"):
        explain(gated_run, dataclasses.replace(lesions, class_names=("x", "y")), lesion_store)


def test_a_failure_leaves_the_last_pictures(lesions, lesion_store, gated_run, tmp_path):
    explain(gated_run, lesions, lesion_store, **QUICKLY)
    first = digests(gated_run / "explain")
    (tmp_path / "p15_0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"p15_0\.png: cannot be read as an image"):
        explain(gated_run, lesions, lesion_store, masks=tmp_path, **QUICKLY)
    assert digests(gated_run / "explain") == first


def test_file_names_are_safe_and_tell_ids_apart():
    ids = [
        "a/b.png",
        "a_b.png",
        "a b.png",
        "A_b.png",
        "../../etc/passwd",
        "..",
        "sheet",
        "é",
        "ü",
        "x" * 300,
        "x" * 299,
    ]
    names = [file_name(name) for name in ids]
    assert len({name.lower() for name in names}) == len(ids)
    for name in names:
        assert name.endswith(".png")
        assert not name.startswith(".")
        assert len(name) < 110
        assert not set(name) & set("/\\: ")
    assert file_name("p07_1") == "p07_1.png"
    assert "sheet.png" not in names
    assert Sample("p07_1", 0, "test", "p07").id in file_name("p07_1")
