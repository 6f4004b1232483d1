"""What stands on the page for clinician and reviewer: tiles, predictive values, subgroups, checklists, signature."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from pipeline.evaluate.evaluate import evaluate
from pipeline.evaluate.operating import predictive_values
from pipeline.report.evidence import Signature
from pipeline.report.page.checklists import CLAIM, TRIPOD, present
from pipeline.report.page.tables import elsewhere_table
from tests.report.conftest import CLASSES, Case, Page
from tests.train.scenes import PLAIN, do, make_dataset


def tiles(text: str) -> dict[str, str]:
    """Value of each tile by its label."""
    found = re.findall(r"<li><b>(.*?)</b><span class=\"label\">(.*?)</span>(.*?)</li>", text)
    return {label: f"{value} {re.sub('<.*?>', ' ', below).strip()}" for value, label, below in found}


def test_tiles_speak_of_the_positive_class_at_the_first_operating_point(gated: Case) -> None:
    at = gated.figures["operating_points"]["youden"][CLASSES[1]]
    counts, shown = at["counts"], tiles(gated.page())
    assert list(shown) == ["AUC", "sensitivity", "specificity", "PPV", "NPV", "prevalence here"]
    for key, (right, made) in {
        "sensitivity": (counts["tp"], counts["tp"] + counts["fn"]),
        "specificity": (counts["tn"], counts["tn"] + counts["fp"]),
        "PPV": (counts["tp"], counts["tp"] + counts["fp"]),
        "NPV": (counts["tn"], counts["tn"] + counts["fn"]),
    }.items():
        found = at[key.lower()]
        assert shown[key].startswith(f"{100 * right / made:.0f} %")
        assert f"{100 * found['low']:.0f} to {100 * found['high']:.0f} %" in shown[key]
        assert f"{right} of {made} " in shown[key]
    assert shown["prevalence here"].endswith("6 of 12 images")


def test_swapping_the_positive_class_swaps_the_page(gated: Case, tmp_path) -> None:
    """At the decision that the model makes by itself, which no threshold shifts."""
    dataset = make_dataset()
    do(dataset, None, tmp_path, model=PLAIN)
    shown = []
    for positive in ("a", "b"):
        named = dataclasses.replace(dataset, positive=positive)
        evaluate(tmp_path, named, None, resamples=50, points=())
        text = Case(tmp_path, named, None).page()
        assert f"The class that is looked for (positive) is {positive}." in text
        shown.append(tiles(text))
    first, second = shown
    assert (first["sensitivity"], first["specificity"]) == (second["specificity"], second["sensitivity"])
    assert "PPV" not in first  # without operating points nothing is called


def test_without_a_positive_class_each_is_set_against_the_rest(tmp_path) -> None:
    dataset = make_dataset((24, 24, 24), classes=3, task="multiclass")
    do(dataset, None, tmp_path, model=PLAIN)
    evaluate(tmp_path, dataset, None, resamples=50)
    text = Case(tmp_path, dataset, None).page()
    assert list(tiles(text)) == ["mean AUC", "accuracy", "balanced accuracy", "calibration error"]
    page = Page(text)
    assert "No class is named as the one that is looked for (data.positive)" in page.text
    assert page.text.count("Decision curve of ") == 3
    named = dataclasses.replace(dataset, positive="b")
    evaluate(tmp_path, named, None, resamples=50)
    page = Page(Case(tmp_path, named, None).page())
    assert "AUC of b against the rest" in page.text
    assert page.text.count("Decision curve of ") == 1


def test_several_labels_at_once_and_no_validation_set_have_a_page(tmp_path) -> None:
    dataset = make_dataset((24, 24, 24), classes=3, task="multilabel")
    do(dataset, None, tmp_path, model=PLAIN)
    evaluate(tmp_path, dataset, None, resamples=50, points=())
    text = Page(Case(tmp_path, dataset, None).page()).text
    assert "any number of them at once" in text
    assert "so no thresholds were chosen" in text


def test_predictive_values_at_another_prevalence_by_hand() -> None:
    """Of 1,000 with 100 ill: 90 called rightly and 180 wrongly, 720 cleared rightly and 10 wrongly."""
    assert predictive_values(0.9, 0.8, 0.1) == pytest.approx((90 / 270, 720 / 730))
    assert np.isnan(predictive_values(0.0, 1.0, 0.1)[0])
    share = {"value": 0.9, "low": 0.7, "high": 1.0}
    text = Page(elsewhere_table({"sensitivity": share, "specificity": share | {"value": 0.8}}, "x")).text
    assert "10 %0.333 (0.206 to 1.000)0.986 (0.955 to 1.000)18010" in text


def test_subgroups_stand_on_the_page_with_how_many_they_rest_on(tmp_path) -> None:
    dataset = make_dataset((24, 12, 24))
    samples = [
        dataclasses.replace(sample, group=f"{sample.split}{i // 2}", subgroups=(("f", "m", "")[i // 4 % 3],))
        for i, sample in enumerate(dataset.samples)
    ]
    dataset = dataclasses.replace(dataset, samples=tuple(samples), subgroup_names=("sex",))
    do(dataset, None, tmp_path, model=PLAIN)
    figures = evaluate(tmp_path, dataset, None, resamples=50)
    text = Page(Case(tmp_path, dataset, None).page()).text
    assert "seximagespatientsbAUCsensitivityspecificityaccuracy" in text
    for value, part in figures["subgroups"]["sex"].items():
        auc, sensitivity = part["auc"], part["sensitivity"]
        assert f"{value}{part['n']}{part['groups']}{part['positives']}{auc['value']:.3f}" in text
        assert f"({sensitivity['low']:.3f} to {sensitivity['high']:.3f}) n = {sensitivity['n']}" in text
    assert "The data set names no columns for subgroups" not in text


def test_a_table_without_such_columns_is_said_to_have_none(gated: Case) -> None:
    assert "The data set names no columns for subgroups" in Page(gated.page()).text


def test_checklists_have_every_item_once_and_point_to_what_is_there(gated: Case) -> None:
    assert [item.number for item in CLAIM] == [str(number) for number in range(1, 45)]
    letters = {3: "abc", 5: "ab", 6: "abc", 8: "abc", 9: "abc", 12: "abcdefg", 18: "abcdef", 20: "abc", 23: "ab"}
    letters[27] = "abc"
    expected = [f"{number}{letter}" for number in range(1, 28) for letter in letters.get(number, [""])]
    assert [item.number for item in TRIPOD] == expected
    text = gated.page()
    ids = set(re.findall(r' id="([^"]+)"', text))
    assert present(gated.collect()) <= ids
    assert set(re.findall(r'href="#([^"]+)"', text)) <= ids
    assert "CLAIM 2024, for AI in medical imaging: " in text


def test_what_is_left_to_a_person_grows_where_a_section_is_missing(gated: Case) -> None:
    rows = {cells[0]: cells[1:] for cells in re.findall(r"<tr><th scope=\"row\">(30)</th>(.*?)</tr>", gated.page())}
    assert "all of it" in rows["30"][0]  # robustness: there are neither subgroups nor a study


def test_author_date_and_versions_are_signed(gated: Case) -> None:
    text = Page(gated.page(signed=Signature("2026-11-28", "A. <b>Reader</b>"))).text
    assert "Author: A. <b>Reader</b>. Date: 2026-11-28. Written by slca-pipeline" in text
    unsigned = Page(gated.page()).text
    assert "Author: not named. Written by" in unsigned
    version = gated.collect().description.provenance["software"]["slca-pipeline"]
    assert f"the model was trained with version {version}." in unsigned


def test_what_an_encoder_has_learnt_is_told_of_the_weights_that_were_used(gated: Case, tmp_path) -> None:
    copy = dataclasses.replace(gated, folder=tmp_path / "run")
    shutil.copytree(gated.folder, copy.folder)
    record = json.loads((copy.folder / "model.json").read_text())
    record["fingerprint"]["weights_sha256"] = "5" * 64
    (copy.folder / "model.json").write_text(json.dumps(record))
    made = {"sha256": "5" * 64, "dice": 0.8949, "recall": 0.96875}
    text = Page(copy.page(encoder_made=made)).text
    assert "Dice from a point on the lesion0.895" in text
    assert "lesions that it finds unasked, as a share0.969" in text
    for other in (made | {"sha256": "6" * 64}, {}, None):
        assert "unasked" not in copy.page(encoder_made=other)


def test_digests_and_settings_are_folded(gated: Case) -> None:
    text = gated.page()
    folded = "".join(re.findall(r"<details>.*?</details>", text, re.DOTALL))
    unfolded = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    digest = gated.collect().weights_sha256
    assert digest in folded
    assert not re.search(r"\b[0-9a-f]{64}\b", unfolded)


def test_external_test_sets_stand_on_the_page_if_they_are_of_this_model(gated: Case, tmp_path) -> None:
    copy = dataclasses.replace(gated, folder=tmp_path / "run")
    shutil.copytree(gated.folder, copy.folder)
    found = gated.figures
    for name, changes in (("hospital", {}), ("stale", {"val_auc": 0.1})):
        (copy.folder / "external" / name).mkdir(parents=True)
        (copy.folder / "external" / name / "metrics.json").write_text(json.dumps(found | {"n": 77} | changes))
    text = copy.page()
    page = Page(text)
    assert f"hospital77{found['bootstrap']['groups']}{found['auc']:.3f}" in page.text
    assert "The figures on the external test set stale are of another model" in page.text
    assert 'href="#elsewhere">On data from elsewhere</a>' in text
    assert "On data from elsewhere" not in Page(gated.page()).text.split("Contents")[1].split("Acting")[0]
