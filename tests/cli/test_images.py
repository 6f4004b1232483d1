"""Images in the store through the real command: kept on request, trained on, and never sent under pseudonyms."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import cache

from .conftest import complaint, copy_of, succeed

KEPT = ("-c", "tiny.yaml", "--set", "store.image_px=64", "--set", "store.path=features/kept.zarr")


@pytest.fixture(scope="module")
def kept(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the trained folder with a store that holds images, too, and a run on it."""
    folder = copy_of(trained, tmp_path_factory.mktemp("kept"))
    succeed(folder, "extract", *KEPT)
    return folder


def test_a_run_on_stored_images_is_the_same_run(kept: Path) -> None:
    assert succeed(kept, "extract", *KEPT)["encoded"] == 0
    report = succeed(kept, "train", *KEPT, "--set", "run=runs/kept")
    assert all("(from the store)" in line for line in report["data"])

    def history(run: str) -> list[dict[str, str]]:
        with (kept / "runs" / run / "history.csv").open() as file:
            return [{**row, "seconds": "", "wait_share": ""} for row in csv.DictReader(file)]

    assert history("kept") == history("demo")
    assert succeed(kept, "evaluate", *KEPT, "--set", "run=runs/demo")["auc"] >= 0  # a run without, a store with
    assert succeed(kept, "evaluate", "-c", "tiny.yaml", "--set", "run=runs/kept")["auc"] >= 0
    image = next((kept / "data/demo").rglob("*.png"))
    assert succeed(kept, "predict", *KEPT, "--set", "run=runs/kept", image)["predictions"]


def test_a_store_with_images_is_looked_after_like_any_other(kept: Path) -> None:
    name = "features/kept.zarr"
    assert succeed(kept, "store", "info", name)["format"] == "zarr 3"
    assert succeed(kept, "store", "inspect", name, "-c", "tiny.yaml")["rows"] == 48
    assert succeed(kept, "store", "inspect", name, "-c", "tiny.yaml", "--plot", "map.png")["plot"]["tap"] == "neck"
    converted = succeed(kept, "store", "convert", name, "features/pooled.h5", "--pool", "2")
    assert "image" in converted["taps"]
    with cache.open_store(kept / name) as store, cache.open_store(kept / "features/pooled.h5") as pooled:
        assert pooled.read([3], ["image"])["image"].tobytes() == store.read([3], ["image"])["image"].tobytes()
    taps = [word for tap in ("patch", "early", "middle", "late", "neck") for word in ("--tap", tap)]
    succeed(kept, "store", "convert", name, "features/without.zarr", *taps)
    assert succeed(kept, "store", "diff", "features/without.zarr", "features/demo.zarr")["equal"]
    shard = next((kept / name / "image").glob("c.*"))
    sound = shard.read_bytes()
    shard.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    assert succeed(kept, "store", "repair", name, *KEPT)["repaired"] == 1
    assert shard.read_bytes() == sound


def test_images_stay_at_home_where_names_do(kept: Path) -> None:
    report = succeed(
        kept, "store", "push", "features/kept.zarr", "sent.zarr", "--pseudonymise", "key", "-c", "tiny.yaml"
    )
    assert report["left_out"] == "image: images identify people, whatever their ids are"
    with cache.open_store(kept / "sent.zarr") as sent, cache.open_store(kept / "features/demo.zarr") as plain:
        assert "image" not in sent.taps
        assert sent.fingerprint == plain.fingerprint
        assert not {row for row in sent.ids} & {row for row in plain.ids}
    plainly = succeed(
        kept, "store", "push", "features/demo.zarr", "other.zarr", "--pseudonymise", "key", "-c", "tiny.yaml"
    )
    assert "left_out" not in plainly


def test_known_masks_have_no_images_beside_them(kept: Path) -> None:
    said = complaint(kept, "extract", *KEPT[:4], "--set", "encoder.name=mask", "--set", "encoder.taps=[mask]", status=2)
    assert "store.image_px: the encoder 'mask' stores no images; set it to null" in said
