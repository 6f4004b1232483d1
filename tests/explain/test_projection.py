"""The map of a data set: clusters come apart, what lies apart is named, and numpy's own decomposition agrees."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import cache
from pipeline.explain import projection
from pipeline.progress import silent
from pipeline.stages import stores
from tests.cli.conftest import complaint, environment, succeed
from tests.explain.test_command import CONFIG

COUNT = 300


def write_store(path, features, *, extents=None, labels=None):
    names = tuple(f"s{i:03d}" for i in range(len(features)))
    rows = [cache.Row(name, bytes([i % 256, i // 256] * 16)) for i, name in enumerate(names)]
    specs = {"neck": cache.TapSpec(*features.shape[1:], "float32")}
    parts = np.ones((len(features), 2), np.float32) if extents is None else extents
    with cache.create_store(path, fingerprint=cache.Fingerprint({"encoder": "x"}), taps=specs, rows=rows) as writer:
        for plan in writer.pending:
            at = list(plan.rows)
            writer.write(plan, {"neck": features[at].astype(np.float32)}, parts[at])
        store = writer.commit()
    if labels is not None:
        store.close()
        plain = path.with_name("labelled.zarr")
        store = cache.convert_store(path, plain, labels=labels)
    return store


@pytest.fixture(scope="module")
def planted():
    """Three classes at corners in 12 directions, a small one among them, and two rows far from all."""
    random = np.random.default_rng(0)
    classes = np.array([0] * 180 + [1] * 100 + [2] * 20)
    corners = np.zeros((3, 12))
    corners[1, 0], corners[2, 1] = 40, 40
    pooled = 100 + corners[classes] + random.standard_normal((COUNT, 12))
    pooled[17, 0] += 120
    pooled[250, 11] += 60
    cells = random.standard_normal((COUNT, 12, 3, 4))
    cells -= cells.mean(axis=(2, 3), keepdims=True)
    return classes, pooled, pooled[:, :, None, None] + 5 * cells


def test_planted_clusters_come_apart_and_planted_outliers_are_named(planted, tmp_path):
    classes, _, features = planted
    plane = projection.project(write_store(tmp_path / "s.zarr", features))
    usual = np.setdiff1d(np.arange(COUNT), [17, 250])
    centres = np.array([plane.at[usual][classes[usual] == k].mean(axis=0) for k in range(3)])
    nearest = ((plane.at[usual, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    np.testing.assert_array_equal(nearest, classes[usual])
    assert [*plane.outliers] == ["s017", "s250"]  # farthest first; and the small class is none
    assert plane.outliers["s017"] > plane.outliers["s250"] > 5
    assert plane.tap == "neck"


def test_a_row_apart_in_no_wide_direction_is_named_too(tmp_path):
    random = np.random.default_rng(0)
    pooled = random.standard_normal((1000, 30))
    pooled[:, :15] *= 10  # wider than the ten directions that are kept
    pooled[123, 29] += 160
    plane = projection.project(write_store(tmp_path / "s.zarr", pooled[:, :, None, None]))
    assert np.abs(plane.at[123]).max() < 40
    assert [*plane.outliers] == ["s123"]


def test_the_plane_is_that_of_a_singular_value_decomposition(planted, tmp_path, monkeypatch):
    _, pooled, features = planted
    store = write_store(tmp_path / "s.zarr", features)
    whole = projection.project(store)
    monkeypatch.setattr(projection, "_AT_ONCE_BYTES", 8 * 12 * 12 * 7)  # 7 rows at a time
    plane = projection.project(store)
    np.testing.assert_allclose(plane.at, whole.at, atol=1e-3)
    _, widths, directions = np.linalg.svd(pooled - pooled.mean(axis=0), full_matrices=False)
    expected = (pooled - pooled.mean(axis=0)) @ directions[:2].T
    np.testing.assert_allclose(np.abs(plane.at), np.abs(expected), atol=1e-3)
    assert plane.explained == pytest.approx((widths**2 / (widths**2).sum())[:2], rel=1e-5)


def test_padding_is_not_averaged(planted, tmp_path):
    _, _, features = planted
    padded = np.concatenate((features, np.full((COUNT, 12, 1, 4), 1e4)), axis=2)
    parts = np.tile(np.array([3 / 4, 1], np.float32), (COUNT, 1))
    plane = projection.project(write_store(tmp_path / "padded.zarr", padded, extents=parts))
    np.testing.assert_allclose(plane.at, projection.project(write_store(tmp_path / "s.zarr", features)).at, atol=1e-2)


def test_rows_that_are_not_finite_are_left_out(planted, tmp_path):
    _, _, features = planted
    broken = features.copy()
    broken[3, 2, 0, 0], broken[4, 2, 0, 0] = np.nan, np.inf
    plane = projection.project(write_store(tmp_path / "s.zarr", broken))
    assert plane.rows.tolist() == [0, 1, 2, *range(5, COUNT)]
    assert np.isfinite(plane.at).all()
    assert [*plane.outliers] == ["s017", "s250"]


def test_the_command_draws_the_labels_that_travel_with_a_store(planted, tmp_path):
    classes, _, features = planted
    splits = tuple("train" if i % 3 else "test" for i in range(COUNT))
    labels = cache.Labels(("x", "y", "z"), tuple(classes.tolist()), splits)
    write_store(tmp_path / "s.zarr", features, labels=labels).close()
    report = succeed(tmp_path, "store", "inspect", "labelled.zarr", "--plot", "maps/plane.png")
    assert report["counts"]["test"].keys() == {"x", "y", "z"}
    assert [*report["plot"]["outliers"]] == ["s017", "s250"]
    assert "2 lie apart: s017, s250" in report["plot"]["alt"]
    with Image.open(tmp_path / "maps/plane.png") as picture:
        assert min(picture.size) > 500
    said = complaint(tmp_path, "store", "inspect", "labelled.zarr", "--plot", "p.png", "--tap", "late", status=2)
    assert "has no tap 'late'; it has neck" in said
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "store", "inspect", "labelled.zarr", "--json"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "plot" not in json.loads(done.stdout)


def test_a_panel_by_class_and_one_by_split_and_the_outliers_named(planted, tmp_path, figures):
    classes, _, features = planted
    splits = tuple("train" if i % 3 else "test" for i in range(COUNT))
    labels = cache.Labels(("x", "y", "z"), tuple(classes.tolist()), splits)
    with write_store(tmp_path / "s.zarr", features) as store:
        at = projection.project(store).at
    report = stores.draw_plane(tmp_path / "s.zarr", tmp_path / "plane.png", silent, labels)
    assert "coloured by class and by split" in report["alt"]
    top, bottom = figures["plane.png"].subfigs
    expected = {"by class": np.array(labels.class_names)[classes], "by split": np.array(splits)}
    assert [axes.get_title() for axes in top.axes] == [*expected]
    for axes in top.axes:
        names = expected[axes.get_title()]
        *groups, first, second = axes.collections
        colours = set()
        for group in groups:
            name = group.get_label().split(" (")[0]
            assert group.get_label() == f"{name} ({(names == name).sum()})"
            np.testing.assert_array_equal(group.get_offsets(), at[names == name])
            colours.add(tuple(group.get_facecolor()[0]))
        assert len(colours) == len(groups) == len(set(names))
        assert {text.get_text() for text in axes.get_legend().get_texts()} == {group.get_label() for group in groups}
        for number, (ring, index) in enumerate(((first, 17), (second, 250))):
            np.testing.assert_array_equal(ring.get_offsets(), at[index : index + 1])
            assert axes.texts[number].get_text() == str(number + 1)
            assert axes.texts[number].xy == pytest.approx(at[index])
        assert "PC 1" in axes.get_xlabel()
    assert "PC 2" in top.axes[0].get_ylabel()
    assert [text.get_text() for text in bottom.texts] == ["apart from the others:\n1  s017\n2  s250"]


def test_a_store_without_labels_or_data_is_looked_at_without(planted, tmp_path, figures):
    _, _, features = planted
    write_store(tmp_path / "s.zarr", features).close()
    report = succeed(tmp_path, "store", "inspect", "s.zarr", "--plot", "plane.png")
    assert "no splits, classes or counts of them: " in report["without_labels"]
    assert "configs/default.yaml" in report["without_labels"]
    assert (report["rows"], report["counts"]) == (COUNT, {})
    assert "coloured" not in report["plot"]["alt"]
    assert [*report["plot"]["outliers"]] == ["s017", "s250"]
    (tmp_path / "configs").mkdir()
    config = CONFIG.replace("layout: demo, path: data, count: 36, size_px: 64", "layout: folder, path: nowhere")
    (tmp_path / "configs/default.yaml").write_text(config)
    assert "nowhere" in succeed(tmp_path, "store", "inspect", "s.zarr")["without_labels"]
    said = complaint(tmp_path, "store", "inspect", "s.zarr", "-c", "configs/default.yaml", status=1)
    assert "nowhere: there is no such folder" in said  # who names a configuration wants its labels
    complaint(tmp_path, "store", "inspect", "s.zarr", "--set", "data.path=elsewhere", status=1)
    stores.draw_plane(tmp_path / "s.zarr", tmp_path / "again.png", silent)
    (axes,) = figures["again.png"].subfigs[0].axes
    assert axes.get_title() == "no labels"
