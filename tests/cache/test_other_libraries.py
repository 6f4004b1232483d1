"""A store in the hands of programs that know nothing of this package: xarray, tensorstore, zarrs, zarr, h5netcdf."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import cache
from tests.cache.golden import make_golden
from tests.cache.making import TAPS, build, feature, row, rows
from tests.cache.serving import Server

COUNT = 11


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("store") / "store.zarr", rows(range(COUNT)))[0].path


def test_xarray_opens_a_store_as_one_data_set_with_ids_as_a_coordinate(path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    with xarray.open_zarr(path, chunks=None) as found:
        assert set(found.data_vars) == set(TAPS)
        assert found["id"].values.tolist() == [f"image-{n}.png" for n in range(COUNT)]
        for name, tap in TAPS.items():
            assert found[name].dims == ("id", f"{name}_channel", f"{name}_y", f"{name}_x")
            np.testing.assert_array_equal(found[name].sel(id="image-7.png"), feature(7)[name])
            assert found[name].dtype == tap.dtype
        assert (
            found.attrs["feature_store"]["fingerprint"]
            == json.loads((path / "zarr.json").read_text())["attributes"]["feature_store"]["fingerprint"]
        )


def test_xarray_opens_the_index_beside_it(path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    with xarray.open_datatree(path, engine="zarr", chunks=None) as tree:
        assert tree["index/slot"].values.tolist() == list(range(COUNT))
        assert tree["index/extent"].sel(id="image-3.png").shape == (2,)
        assert set(tree["index/crc32c"].data_vars) == set(TAPS)


def test_xarray_opens_a_store_at_a_url(server: Server, path: Path, tmp_path: Path) -> None:
    """A server of files lists nothing: all metadata are at the root."""
    xarray = pytest.importorskip("xarray")
    shutil.copytree(path, tmp_path / "served/store.zarr")
    with xarray.open_zarr(f"{server.url}/store.zarr", chunks=None) as found:
        np.testing.assert_array_equal(found["neck"].sel(id="image-2.png"), feature(2)["neck"])


def test_the_id_of_a_slot_is_that_of_its_first_row_and_nothing_where_none_lies(tmp_path: Path) -> None:
    """After an update: one sample is gone, one came, and two have the same pixels."""
    wanted = [*rows(range(1, 6)), row(3, "the same pixels.png"), row(20)]
    build(tmp_path / "store.zarr", rows(range(8)))
    store, _ = build(tmp_path / "store.zarr", wanted)
    ids = zarr.open_group(store.path, mode="r")["id"][:].tolist()
    first = {slot: name for name, slot in reversed(list(zip(store.ids, store.slots.tolist(), strict=True)))}
    assert ids == [first.get(slot, "") for slot in range(len(ids))]
    assert "" in ids
    assert ids.count("image-3.png") == 1
    assert "the same pixels.png" not in ids


@pytest.mark.filterwarnings("ignore:Object at README.md:UserWarning")  # as zarr says of a file that it does not know
def test_an_older_store_is_opened_by_xarray_once_it_is_converted(tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    old = make_golden.HERE / "version-1.zarr"
    with pytest.raises(ValueError, match="conflicting sizes for dimension"):
        xarray.open_zarr(old, chunks=None, consolidated=False)
    new = cache.convert_store(old, tmp_path / "new.zarr")
    with xarray.open_zarr(new.path, chunks=None) as found:
        np.testing.assert_array_equal(found["neck"].sel(id=new.ids[1]), new.read([1])["neck"][0])


@pytest.mark.parametrize("name", TAPS)
def test_tensorstore_reads_rows_and_knows_their_axes(path: Path, name: str) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
    found = tensorstore.open(spec, read=True).result()
    assert found.domain.labels == ("id", f"{name}_channel", f"{name}_y", f"{name}_x")
    np.testing.assert_array_equal(found[4].read().result(), feature(4)[name])


@pytest.fixture
def rust() -> Iterator[None]:
    """Zarr with the codecs of `zarrs` in place of its own."""
    pytest.importorskip("zarrs")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        yield


def test_zarrs_reads_rows_and_ids(path: Path, rust: None) -> None:
    assert_read_by_zarr(path)


def test_zarr_reads_rows_and_ids_without_a_warning(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_read_by_zarr(path)


def assert_read_by_zarr(path: Path) -> None:
    group = zarr.open_group(path, mode="r")
    assert {name for name, _ in group.arrays()} == {*TAPS, "id"}
    assert group["id"][:].tolist() == [f"image-{n}.png" for n in range(COUNT)]
    for name in TAPS:
        found: Any = group[name]
        assert found.metadata.dimension_names == ("id", f"{name}_channel", f"{name}_y", f"{name}_x")
        np.testing.assert_array_equal(found[3], feature(3)[name])
    whole: Any = group["index/slot"]
    assert whole[:].tolist() == list(range(COUNT))


def test_h5netcdf_opens_the_single_file(tmp_path: Path) -> None:
    """HDF5's own way to name axes needs an array for each; xarray numbers them instead."""
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    store, _ = build(tmp_path / "store.h5", rows(range(COUNT)))
    with xarray.open_dataset(store.path, engine="h5netcdf", phony_dims="access") as found:
        assert set(found.data_vars) == set(TAPS)
        np.testing.assert_array_equal(found["neck"][5], feature(5)["neck"])
