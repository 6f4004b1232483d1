"""Data in a bucket are those on disk, through each service's own package: ids, labels, pixels, masks and features."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec.config
import numpy as np
import pytest

from pipeline.data import load_folder
from pipeline.data.scan import scan
from pipeline.errors import DataError, UnreachableError
from pipeline.extract.extract import extract
from pipeline.url import any_path
from tests.extract.fakes import CountingEncoder, as_encoder

from .buckets import URLS, Buckets, serving_buckets
from .test_url import alike, folder, load, no_pauses

__all__ = ["folder", "no_pauses"]
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read on import; else it asks Google what the bucket is


@pytest.fixture
def buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Buckets]:
    with serving_buckets(tmp_path) as buckets:
        for service, options in buckets.options.items():
            monkeypatch.setitem(fsspec.config.conf, service, options)
        yield buckets


@pytest.mark.parametrize("bucket", URLS.values(), ids=URLS)
def test_a_folder_in_a_bucket_is_the_folder_on_disk(
    folder: Path, buckets: Buckets, bucket: str, tmp_path: Path
) -> None:
    here, there = load(folder), load(any_path(f"{bucket}/images"))
    assert len(there) == 8
    alike(there, here)
    assert all(there.stamp(i) for i in range(8))
    digests = [scan(made, tmp_path / f"{i}.npz").digests for i, made in enumerate((here, there))]
    np.testing.assert_array_equal(*digests)
    stores = [Path(f"{i}.zarr") for i in range(2)]
    for made, store in zip((here, there), stores, strict=True):
        assert extract(made, as_encoder(CountingEncoder()), store, reading={}).rows == 8
    files = [{p.relative_to(s): p.read_bytes() for p in s.rglob("*") if p.is_file()} for s in stores]
    assert files[0] == files[1] != {}


@pytest.mark.parametrize("bucket", URLS.values(), ids=URLS)
def test_a_wrong_bucket_and_a_refusal_are_told_apart_and_by_the_url(
    folder: Path, buckets: Buckets, bucket: str
) -> None:
    with pytest.raises(DataError, match=rf"^{bucket}/imgaes: there is no file below this URL; check"):
        load_folder(any_path(f"{bucket}/imgaes"))
    refused = r"the server does not let you read this; give what it knows you by .* continues"
    missing = refused if bucket.startswith("hf:") else "there is no such file; check the URL"  # the hub hides which
    with pytest.raises((DataError, UnreachableError), match=rf"^{bucket}s/images: {missing}"):
        load_folder(any_path(f"{bucket}s/images"))
    made = load_folder(any_path(f"{bucket}/images"), draw="balanced")
    buckets.refuses = True
    with pytest.raises(UnreachableError, match=rf"^{bucket}/images: {refused}"):
        load_folder(any_path(f"{bucket}/images"))
    with pytest.raises(UnreachableError, match=rf"^{bucket}/images/benign/.*png: {refused}"):
        made.read(0)
