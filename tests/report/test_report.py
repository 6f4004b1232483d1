"""The page says what the run's files say, to people and to those who cannot see it, and trusts no name in them."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cache
from pipeline.errors import RunError
from pipeline.evaluate import intervals
from pipeline.evaluate.evaluate import evaluate
from pipeline.explain.explain import explain
from pipeline.records import write_csv
from pipeline.report import report
from pipeline.report.page.figures import calibration
from tests.report.conftest import HOSTILE, Case, Page, with_a_leak
from tests.train.scenes import PLAIN, do, make_dataset


@pytest.fixture(scope="module")
def text(gated: Case) -> str:
    return gated.page()


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_names_from_files_stay_text(text: str, page: Page) -> None:
    assert not page.all("script", "i")
    assert "<script" not in text
    assert HOSTILE in page.text
    assert any(HOSTILE in (attributes["aria-label"] or "") for attributes in page.all("svg") if "role" in attributes)


def test_elements_are_closed_and_nothing_is_fetched_or_run(page: Page) -> None:
    assert page.open == []
    assert not page.all("script", "iframe", "object", "video", "audio", "form")
    links = [a[key] for _, a in page.elements for key in ("src", "href", "action", "xlink:href") if a.get(key)]
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    (policy,) = (a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_who_cannot_see_it_finds_the_way(page: Page) -> None:
    assert page.all("html")[0]["lang"] == "en"
    headings = [int(tag[1]) for tag, _ in page.elements if tag in {"h1", "h2", "h3", "h4"}]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(headings))
    assert all(attributes.get("scope") in {"col", "row"} for attributes in page.all("th"))
    assert all(attributes.get("aria-label") for attributes in page.all("table"))
    for drawn in page.all("svg"):
        assert drawn.get("aria-hidden") == "true" or (drawn["role"] == "img" and drawn["aria-label"])


def test_figures_are_those_of_the_run(gated: Case, page: Page) -> None:
    figures = gated.figures
    for name in ("auc", "ap", "acc", "balanced_acc", "f1", "ece", "brier"):
        ends = figures["intervals"][name]
        assert f"{figures[name]:.3f}{ends['low']:.3f} to {ends['high']:.3f}" in page.text
    for point in figures["operating_points"].values():
        for found in point.values():
            assert f"{found['threshold']:.3f}{found['sensitivity']['value']:.3f} (" in page.text
    alts = " ".join(str(attributes.get("aria-label")) for attributes in page.all("svg"))
    last = gated.dataset.class_names[-1]
    low, high = (figures["intervals"]["class_auc"][last][end] for end in ("low", "high"))
    assert f"AUC {figures['class_auc'][last]:.3f} (95 % interval {low:.3f} to {high:.3f}); chance is 0.5." in alts
    assert f"Expected calibration error {figures['ece']:.3f}." in alts
    assert f"highest, {figures['val_auc']:.3f}, at epoch {figures['best_epoch']} of 3" in alts
    right = sum(figures["confusion"][k][k] for k in range(2))
    assert f"{right} of 12 images are classified rightly." in page.text


def test_the_calibration_curve_has_the_intervals_that_the_run_wrote_down(gated: Case) -> None:
    evidence = gated.collect()
    random = np.random.default_rng(0)
    labels, p = np.arange(60) % 2, random.random(60)
    said = dataclasses.replace(
        evidence.said, groups=tuple("abcdef" * 10), labels=labels, probabilities=np.stack([1 - p, p], axis=1)
    )
    page = Page(calibration(dataclasses.replace(evidence, said=said)))
    rows = intervals.reliability("binary", labels, said.probabilities, said.groups)
    bars = [attributes for attributes in page.all("line") if "bar" in str(attributes["class"]).split()]
    assert len(bars) == len(rows)
    for bar, row in zip(bars, rows, strict=True):
        drawn = [(284 - float(bar[y] or "")) / 272 for y in ("y1", "y2")]  # the plot is 272 high and ends at 284
        assert drawn == pytest.approx([row["low"], row["high"]], abs=1e-3)
    assert any(row["low"] < row["high"] for row in rows)
    within = sum(row["low"] <= row["confidence"] <= row["high"] for row in rows)
    assert f"In {within} of {len(rows)} steps of confidence the 95 % interval of that share holds" in page.text
    with (gated.folder / "reliability.csv").open() as file:
        written = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    said = evidence.said
    again = intervals.reliability("binary", said.labels, said.probabilities, said.groups)
    assert written == [pytest.approx(row) for row in again]


def test_identity_costs_and_versions_are_on_the_page(gated: Case, page: Page) -> None:
    described = json.loads((gated.folder / "model.json").read_text())
    evidence = gated.collect()
    assert evidence.description.fingerprint is not None
    assert evidence.description.fingerprint.digest() in page.text
    assert evidence.weights_sha256 in page.text
    for name, version in described["provenance"]["software"].items():
        assert f"{name}{version}" in page.text
    assert f"for 3 epochs on {described['provenance']['device']}" in page.text


def test_the_same_run_gives_the_same_bytes(gated: Case, text: str) -> None:
    assert gated.page() == text
    written = report.write(gated.folder, gated.collect()).read_text()
    assert written == text
    assert not list(gated.folder.glob("*.partial"))


def test_a_clean_data_set_and_one_with_a_leak(gated: Case, page: Page) -> None:
    assert "No two splits share an image: the SHA-256 of the pixels of 48 images were compared." in page.text
    assert "No patient lies in more than one split (24 patients)." in page.text
    assert "The features were made from these very pixels." in page.text
    leaking = dataclasses.replace(gated, dataset=with_a_leak(gated.dataset))
    found = Page(leaking.page()).text
    assert "Identical images in more than one split: 1" in found
    names = [gated.dataset.samples[gated.dataset.indices(split)[0]].id for split in ("train", "test")]
    assert ", ".join(names) in found
    assert "Images with other pixels now than when their features were made: 1." in found


def test_what_it_does_not_show_is_said(gated: Case, page: Page) -> None:
    low, high = (gated.figures["intervals"]["auc"][end] for end in ("low", "high"))
    for sentence in (
        "The test set is small: it has 12 images of 6 patients.",
        f"the AUC lies between {low:.2f} and {high:.2f}",
        "one training run, with seed 1",
        "chosen on the validation set",
        "It does not show that the gates help",
        "none of the published ones whose SHA-256 this program knows",
        "no medical device",
    ):
        assert sentence in page.text
    assert "generated by a program" not in page.text
    told = Page(gated.page(generated=True, untrained=True)).text
    assert "The images are generated by a program" in told
    assert "drawn from a seed and not trained: nothing here is evidence about SAM" in told


def test_patients_that_nobody_named(tmp_path, scene_without_groups: Case) -> None:
    text = Page(scene_without_groups.page()).text
    assert "Which images are of the same patient is not known" in text
    assert "If a patient has images in several splits, the figures are too good" in text


@pytest.fixture(scope="module")
def scene_without_groups(tmp_path_factory) -> Case:
    """A plain run whose groups are its samples."""
    folder, dataset = tmp_path_factory.mktemp("plain"), make_dataset()
    samples = tuple(dataclasses.replace(sample, group=sample.id) for sample in dataset.samples)
    dataset = dataclasses.replace(dataset, samples=samples)
    do(dataset, None, folder, model=PLAIN)
    evaluate(folder, dataset, None, resamples=200)
    return Case(folder, dataset, None)


def test_a_plain_run_has_no_encoder(scene_without_groups: Case) -> None:
    text = Page(scene_without_groups.page()).text
    assert "This model reads no features of an encoder." in text
    assert "How well does a tiny tell a and b apart on scene without gates? The class that is looked for" in text
    assert "No encoder takes part: the model sees the images alone." in text


def test_what_is_missing_is_refused_in_one_line(gated: Case, scene_without_groups: Case, tmp_path) -> None:
    copy = dataclasses.replace(gated, folder=tmp_path / "run")
    shutil.copytree(gated.folder, copy.folder)
    with pytest.raises(RunError, match="trained on other samples, labels or splits than 'scene' has now: give the run"):
        dataclasses.replace(copy, dataset=scene_without_groups.dataset).collect()
    stale = copy.figures | {"val_auc": 0.123}
    (copy.folder / "metrics.json").write_text(json.dumps(stale))
    with pytest.raises(RunError, match="are those of another model: run `pipeline evaluate` again"):
        copy.collect()
    (copy.folder / "metrics.json").unlink()
    with pytest.raises(RunError, match=r"no metrics in .*: run `pipeline evaluate` on this run first"):
        copy.collect()
    with pytest.raises(RunError, match=r"no study at .*: name the folder that has its table\.csv"):
        gated.collect(study=tmp_path)


def test_intervals_over_other_patients_than_are_known_now_are_refused(gated: Case, tmp_path) -> None:
    samples = [dataclasses.replace(sample, group=sample.id) for sample in gated.dataset.samples]
    dataset = dataclasses.replace(gated.dataset, samples=tuple(samples))
    with pytest.raises(RunError, match=r"of other groups \(patients\) than .* has now: run `pipeline evaluate`"):
        dataclasses.replace(gated, dataset=dataset).collect()


def test_a_run_whose_weights_were_not_kept_says_so(gated: Case, tmp_path) -> None:
    copy = dataclasses.replace(gated, folder=tmp_path / "run")
    shutil.copytree(gated.folder, copy.folder, ignore=shutil.ignore_patterns("model.safetensors"))
    with pytest.raises(RunError, match="were not kept: delete this folder and run its study again"):
        copy.collect()
    with cache.open_store(gated.store) as store, pytest.raises(RunError, match="were not kept: delete this folder"):
        explain(copy.folder, gated.dataset, store)
    assert not (copy.folder / "explain-partial").exists()


def test_a_store_that_is_gone_is_said_to_be(gated: Case, tmp_path) -> None:
    text = Page(dataclasses.replace(gated, store=tmp_path / "gone.zarr").page()).text
    assert "The store of the features is not described" in text
    assert "rows in the store" not in text


def test_heat_maps_of_this_model_and_no_other(gated: Case, tmp_path) -> None:
    copy = dataclasses.replace(gated, folder=tmp_path / "run")
    shutil.copytree(gated.folder, copy.folder)
    (copy.folder / "explain").mkdir()
    Image.new("RGB", (8, 8), "red").save(copy.folder / "explain/sheet.png")
    found = {
        "sheet": {"file": "sheet.png", "alt": f"Sheet of {HOSTILE}"},
        "weights_sha256": gated.collect().weights_sha256,
        "localisation": {
            "images": 12,
            "chance": {"mass": 0.1},
            "maps": {"early": {"mass": {"value": 0.2, "low": 0.15, "high": 0.25}}, "Grad-CAM": {}},
            "untrained_auc": {"early": [0.97, 0.02, 0.9]},
        },
    }
    (copy.folder / "explain/explain.json").write_text(json.dumps(found))
    page = Page(copy.page())
    (image,) = page.all("img")
    assert image["alt"] == f"Sheet of {HOSTILE}"
    assert image["src"].startswith("data:image/png;base64,")
    assert "AUC, weights just drawn (3 seeds)chance0.100early0.200 (0.150 to 0.250)0.020 to 0.970Grad-CAM" in page.text
    (copy.folder / "explain/explain.json").write_text(json.dumps(found | {"weights_sha256": "other"}))
    page = Page(copy.page())
    assert not page.all("img")
    assert "heat maps in the run's folder are of another model" in page.text


@pytest.mark.parametrize("way", ["up", "absolute", "link"])
def test_a_page_shows_no_file_from_outside_of_the_run(gated: Case, tmp_path: Path, way: str) -> None:
    copy = dataclasses.replace(gated, folder=tmp_path / "run")
    shutil.copytree(gated.folder, copy.folder)
    (copy.folder / "explain").mkdir()
    secret, link = tmp_path / "id_rsa", copy.folder / "explain/sheet.png"
    secret.write_text("the key to everything")
    if way == "link":
        link.symlink_to(secret)
    else:
        Image.new("RGB", (8, 8), "red").save(secret, format="PNG")
    file = {"up": "../../id_rsa", "absolute": str(secret), "link": link.name}[way]
    found = {"sheet": {"file": file, "alt": "a sheet"}, "weights_sha256": gated.collect().weights_sha256}
    (copy.folder / "explain/explain.json").write_text(json.dumps(found | {"localisation": None}))
    with pytest.raises(RunError, match="no PNG file" if way == "link" else "no picture of this run"):
        copy.page()


def test_a_study_stands_beside_the_run(gated: Case, tmp_path) -> None:
    rows = [
        {"variant": "plain", "fraction": "0.1", "score": "auc", "mean": "0.71234", "low": "", "high": "", "note": ""},
        {"variant": f"oracle {HOSTILE}", "fraction": "0.1", "score": "auc", "mean": "0.8"}
        | {"low": "0.75", "high": "0.85", "note": ""},
    ]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    Image.new("RGB", (8, 8), "white").save(tmp_path / "curve.png")
    page = Page(gated.page(study=tmp_path))
    (image,) = page.all("img")
    assert f"Highest mean: auc 0.800 with variant oracle {HOSTILE}, fraction 0.1." in image["alt"]
    assert "plain0.1auc0.7123" in page.text
    assert f"oracle {HOSTILE}0.1auc0.800 (0.750 to 0.850)" in page.text
    assert "variantfractionscoremean" in page.text.replace("\n", "")
    assert "note" not in page.text
    assert "It does not show that the gates help" in page.text
    assert "It does not hold this run together with one that differs from it in the gates alone." in page.text
    assert "cross-validation: a score" not in page.text
    (tmp_path / "folds.csv").touch()
    assert "It is a cross-validation: a score is that of all samples" in Page(gated.page(study=tmp_path)).text


@pytest.fixture(scope="module")
def study(gated: Case, tmp_path_factory) -> Path:
    """A study of the gated run and of the plain one on the same images."""
    folder = tmp_path_factory.mktemp("studies") / "both"
    shutil.copytree(gated.folder, folder / "runs/gated", ignore=shutil.ignore_patterns("*.safetensors"))
    do(gated.dataset, None, folder / "runs/plain", model=PLAIN)
    evaluate(folder / "runs/plain", gated.dataset, None, resamples=200)
    write_csv(folder / "table.csv", [{"variant": "plain", "score": "auc", "mean": 0.5}])
    list_runs(folder, "plain", "gated")
    return folder


def list_runs(study: Path, *names: str) -> None:
    write_csv(study / "results.csv", [{"variant": name, "run": f"studies/elsewhere/runs/{name}"} for name in names])


def test_a_study_of_this_run_and_the_plain_one_shows_whether_gates_help(gated: Case, study: Path) -> None:
    assert "It does not show that" not in Page(gated.page(study=study)).text
    plain = dataclasses.replace(gated, folder=study / "runs/plain")
    assert "It does not show that" not in Page(plain.page(study=study)).text
    assert "better or worse than a gated classifier" in Page(plain.page()).text


@pytest.mark.parametrize("what", ["without it", "without the plain one", "other settings", "other images"])
def test_a_study_of_something_else_does_not_show_whether_gates_help(gated: Case, study: Path, tmp_path, what) -> None:
    shutil.copytree(study, tmp_path / "study")
    if what == "without it":
        list_runs(tmp_path / "study", "plain")
    elif what == "without the plain one":
        list_runs(tmp_path / "study", "gated", "gone")
    elif what == "other settings":
        file = tmp_path / "study/runs/plain/model.json"
        described = json.loads(file.read_text())
        described["provenance"]["settings"]["train"]["lr"] = 0.5
        file.write_text(json.dumps(described))
    else:
        file = tmp_path / "study/runs/plain/predictions.csv"
        rows = [row | {"pixels_sha256": "0" * 64} for row in csv.DictReader(file.read_text().splitlines())]
        write_csv(file, rows)
    assert "It does not show that the gates help" in Page(gated.page(study=tmp_path / "study")).text


def test_the_words_for_the_curve_of_a_study_are_about_the_score_that_it_shows(gated: Case, tmp_path) -> None:
    means = {"plain": {"auc": "0.7", "acc": "0.99", "ece": "0.01"}, "gated": {"auc": "0.8", "acc": "0.9", "ece": "0.2"}}
    lines = [f"{variant},{score},{mean}" for variant, of in means.items() for score, mean in of.items()]
    (tmp_path / "table.csv").write_text("\n".join(["variant,score,mean", *lines]))
    Image.new("RGB", (8, 8), "white").save(tmp_path / "curve.png")
    page = Page(gated.page(study=tmp_path))
    (image,) = page.all("img")
    finding = "Highest mean: auc 0.800 with variant gated. Lowest: auc 0.700 with variant plain."
    assert str(image["alt"]).endswith(f"mean auc over the share of the training set. {finding}")
    assert f"Data efficiency. {finding}" in page.text


def test_energy_is_said_not_to_be_measured(page: Page) -> None:
    assert "energynot measured" in page.text
