"""A feed of int8 or bfloat16 gives the bits that reading the store as numbers gives, wherever its arrays wait."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cache
from cache import packing
from pipeline.train.feeding.feature_dataset import FeatureDataset
from pipeline.train.feeding.feed import Feed
from pipeline.train.feeding.packed import unpacked
from pipeline.train.feeding.pooling import pool_rows
from tests.train.scenes import TAPS

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["int8", "bfloat16"])
def packed(request, store, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / f"{request.param}.zarr"
    fingerprint = cache.Fingerprint({**store.fingerprint.fields, "dtype": request.param})
    return cache.convert_store(store.path, path, dtype=request.param, fingerprint=fingerprint)


@pytest.mark.parametrize("place", ["device", "host", "stream"])
def test_a_feed_gives_the_numbers_of_the_store(place, packed, scene):
    feed = Feed(scene, "train", packed, taps=tuple(TAPS), image_px=16, device=CPU, place=place)
    order = [torch.tensor([5, 0, 7]), torch.tensor([3, 3])]
    seen = 0
    for batch in feed.batches(order):
        read = packed.read(feed.rows[batch.positions.numpy()], tuple(TAPS))
        for tap, numbers in read.items():
            assert batch.features[tap].dtype == getattr(torch, packed.taps[tap].numbers)
            assert batch.features[tap].numpy().tobytes() == numbers.tobytes()
            seen += 1
    assert seen == 4


def test_arrays_wait_and_travel_as_they_are_stored(packed, scene):
    feed = Feed(scene, "train", packed, taps=("neck",), image_px=None, device=CPU, place="host")
    kinds = {name: dtype for name, (_, dtype) in feed.shapes().items()}
    if packed.taps["neck"].dtype == "int8":
        assert kinds == {"neck": torch.int8, "neck.scale": torch.float32}
    else:
        assert kinds == {"neck": torch.bfloat16}
    assert feed._bytes()[1] == len(feed) * sum(
        packed.arrays[name].row_bytes for name in kinds
    )  # what is chosen by where it fits


def test_pooled_features_are_those_of_the_numbers(packed):
    rows = np.arange(10)
    found = pool_rows(packed, rows, ["neck"])
    expected = packed.read(rows, ["neck"], dtype="float32")["neck"].astype(packed.taps["neck"].numbers)
    np.testing.assert_allclose(found[:, : expected.shape[1]], expected.astype(np.float64).mean((2, 3)), rtol=1e-4)


def test_a_data_set_for_a_loader_gives_the_numbers_of_the_store(packed):
    dataset = FeatureDataset(packed)
    for index, item in zip([7, 2], dataset.__getitems__([7, 2]), strict=True):
        for tap, numbers in packed.read([index]).items():
            assert item["features"][tap].numpy().tobytes() == numbers[0].tobytes()


def test_torch_scales_every_product_to_the_bits_that_numpy_gives():
    largest = np.arange(1, 0x7C00, 7, dtype=np.uint16).view(np.float16).astype(np.float32)
    scales = (largest / np.float32(127)).reshape(1, -1, 1, 1)
    whole = np.broadcast_to(np.arange(-127, 128, dtype=np.int8).reshape(1, 1, 1, -1), (1, scales.shape[1], 1, 255))
    expected = np.empty(whole.shape, np.float16)
    packing.scale_up(np.ascontiguousarray(whole), scales, expected)

    stored = SimpleNamespace(taps={"neck": cache.TapSpec(scales.shape[1], 1, 255, "int8")})
    arrays = {"neck": torch.from_numpy(whole.copy()), "neck.scale": torch.from_numpy(scales)}
    assert unpacked(stored, ["neck"], arrays)["neck"].numpy().tobytes() == expected.tobytes()
