"""Masks are a tap like the others: made in one pass, resumed to the same bytes, kept whole and sent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import cache
from pipeline.data import load_demo
from pipeline.data.layouts.demo import generate_demo
from pipeline.encoders import build_encoder, make_recipe, write_untrained_encoder
from pipeline.encoders.frozen import FrozenEncoder
from pipeline.errors import CheckpointError, ConfigError
from pipeline.extract.extract import extract
from pipeline.progress import silent
from pipeline.stages import stores

RULES = {"points": 4, "predicted_iou": 0.0, "stability": 0.0, "overlap": 1.0, "side_px": 64}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "sam_demo.pth"
    write_untrained_encoder("sam_demo", path, seed=3)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    """A store with masks of six images."""
    folder = tmp_path_factory.mktemp("made")
    generate_demo(folder / "demo", count=6, size_px=64, seed=0)
    path = folder / "store.zarr"
    run(folder / "demo", path, weights)
    return path


def encoder(weights: Path, taps: tuple[str, ...] = ("neck", "masks"), **rules: object):
    return build_encoder("sam_demo", checkpoint=weights, taps=taps, pool=2, masks={**RULES, **rules})


def run(demo: Path, path: Path, weights: Path, **options: object):
    return extract(load_demo(demo), encoder(weights), path, reading={}, batch_size=2, shard_mib=1, **options)


def stop(demo: Path, path: Path, weights: Path, *, after: int) -> None:
    """The same run, stopped when that many images are encoded."""

    class StopError(Exception):
        pass

    def watch(stage: str, done: int, total: int, **_: object) -> None:
        if stage == "encode" and done >= after:
            raise StopError

    with pytest.raises(StopError):
        run(demo, path, weights, progress=watch)


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_store_has_masks_and_their_scores(made: Path, weights: Path) -> None:
    with cache.open_store(made) as store:
        assert store.taps["masks"] == cache.TapSpec(1, 64, 64, "uint8")
        assert store.taps["mask_scores"] == cache.TapSpec(2, 255, 1, "float32")
        assert store.taps["neck"].dtype == "float16"
        rows = store.read(range(len(store)))
    counts = (rows["mask_scores"][:, 1, :, 0] > 0).sum(axis=1)
    assert (rows["masks"].max(axis=(1, 2, 3)) <= counts).all()
    assert (counts > 3).all()
    plain = build_encoder("sam_demo", checkpoint=weights, taps=["neck"], pool=2)
    image = load_demo(made.parent / "demo").read(0)
    prepared = plain.prepare(image)
    pixels, sizes = torch.stack([prepared.pixels] * 2), torch.tensor([prepared.size] * 2)
    alone = plain.encode(pixels, sizes, torch.float16)["neck"][0].numpy()
    np.testing.assert_array_equal(rows["neck"][0], alone)  # the pass that makes masks makes the same features
    assert cache.verify(made) == ()


def test_a_stopped_run_ends_with_the_same_bytes(made: Path, weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    stop(made.parent / "demo", path, weights, after=4)
    run(made.parent / "demo", path, weights)
    taps = ("masks/", "mask_scores/", "neck/")
    whole, again = (
        {name: content for name, content in files(store).items() if name.startswith(taps)} for store in (made, path)
    )
    assert whole == again


def test_a_stopped_run_into_one_file_ends_with_the_same_bytes(
    made: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.extract.extract._MASKED_ROWS", 2)
    whole, path = tmp_path / "whole.h5", tmp_path / "stopped.h5"
    run(made.parent / "demo", whole, weights)
    stop(made.parent / "demo", path, weights, after=5)
    assert cache.info(path).shards_done
    run(made.parent / "demo", path, weights)
    assert path.read_bytes() == whole.read_bytes()


def test_a_stop_loses_the_masks_of_few_images(
    made: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.extract.extract._MASKED_ROWS", 2)
    path = tmp_path / "store.zarr"
    stop(made.parent / "demo", path, weights, after=5)
    assert run(made.parent / "demo", path, weights).encoded <= 4
    with cache.open_store(path) as store, cache.open_store(made) as whole:
        for tap, rows in whole.read(range(6)).items():
            np.testing.assert_array_equal(store.read(range(6))[tap], rows)
    assert {len(list((of / "masks").glob("c.*"))) for of in (path, made)} == {3, 1}


def test_a_damaged_mask_is_found_and_encoded_again(made: Path, weights: Path, tmp_path: Path) -> None:
    from pipeline.extract.repair import repair

    path = tmp_path / "store.zarr"
    run(made.parent / "demo", path, weights)
    before = files(path)
    file = next((path / "masks").glob("c.*"))
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert {damage.tap for damage in cache.verify(path)} == {"masks"}
    repair(load_demo(made.parent / "demo"), encoder(weights), path, reading={}, batch_size=2)
    assert files(path) == before


def test_masks_are_searched_in_real_images_alone(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[tuple[int, int]] = []

    def count(self: FrozenEncoder, maps: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        searched.append(size)
        return torch.full((1, 64, 64), len(searched), dtype=torch.uint8), torch.zeros(2, 255, 1)

    monkeypatch.setattr(FrozenEncoder, "find_masks", count)
    generate_demo(tmp_path / "demo", count=5, size_px=64, seed=0)
    run(tmp_path / "demo", tmp_path / "store.zarr", weights)  # the last of three batches is half full
    assert len(searched) == 5
    with cache.open_store(tmp_path / "store.zarr") as store:
        assert store.read(range(5))["masks"][:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]


def test_a_conversion_leaves_masks_and_scores_whole(made: Path, tmp_path: Path) -> None:
    stores.convert(made, tmp_path / "pooled.h5", silent, pool=2)
    stores.convert(made, tmp_path / "masks.zarr", silent, taps=["masks"])
    with (
        cache.open_store(made) as old,
        cache.open_store(tmp_path / "pooled.h5") as pooled,
        cache.open_store(tmp_path / "masks.zarr") as only,
    ):
        assert pooled.taps["neck"].shape == (64, 4, 4)
        assert tuple(only.taps) == ("masks", "mask_scores")  # the scores come along
        assert "masks" in only.fingerprint.fields
        for store in (pooled, only):
            for tap in ("masks", "mask_scores"):
                wanted, found = (of.read(range(6), [tap])[tap] for of in (old, store))
                np.testing.assert_array_equal(found, wanted)
    stores.convert(made, tmp_path / "neck.zarr", silent, taps=["neck"])
    with cache.open_store(tmp_path / "neck.zarr") as neck:
        assert "masks" not in neck.fingerprint.fields  # how they were made is no matter of features alone


def test_masks_travel_with_pseudonyms(made: Path, tmp_path: Path) -> None:
    report = stores.push(made, str(tmp_path / "sent.zarr"), silent, key_file=tmp_path / "key")
    assert "left_out" not in report
    with cache.open_store(tmp_path / "sent.zarr") as sent:
        assert tuple(sent.taps) == ("neck", "masks", "mask_scores")
        assert "outlines of what was found, and no grey value" in (sent.card or "")
        assert not any("demo" in name for name in sent.ids)
    report = stores.push(made, str(tmp_path / "open.zarr"), silent)
    assert "outlines of what was found in the images" in report["a_stranger_reads"]


def test_an_image_without_a_mask_is_no_damage(weights: Path, tmp_path: Path) -> None:
    generate_demo(tmp_path / "demo", count=4, size_px=64, seed=0)
    path = tmp_path / "store.zarr"
    strict = encoder(weights, predicted_iou=1.0, stability=1.0, stability_offset=100.0)
    extract(load_demo(tmp_path / "demo"), strict, path, reading={})
    with cache.open_store(path) as store:
        rows = store.read(range(4))
    assert not rows["masks"].any()
    assert not rows["mask_scores"].any()
    assert cache.verify(path) == ()
    found = {tap["tap"]: tap for tap in stores.inspect(path, silent)["taps"]}
    assert not found["masks"]["zero"]
    assert not found["mask_scores"]["zero"]


def test_masks_are_in_the_fingerprint_and_nothing_else_changes() -> None:
    plain, with_masks = (make_recipe("sam_vit_b", taps, pool=4) for taps in (("neck",), ("neck", "masks")))
    before, after = plain.fingerprint("ab"), with_masks.fingerprint("ab")
    masks = after.pop("masks")
    assert masks == {
        "version": 1, "prompts": "points", "points": 32, "predicted_iou": 0.88, "stability": 0.95,
        "stability_offset": 1.0, "overlap": 0.7, "min_region_px": 16, "side_px": 256,
    }  # fmt: skip
    assert after == {**before, "taps": {"neck": "neck", "masks": "masks", "mask_scores": "mask_scores"}}
    other = make_recipe("sam_vit_b", ("neck", "masks"), pool=4, masks={"points": 16, "stability": None})
    assert other.fingerprint("ab")["masks"] == {**masks, "points": 16}
    assert make_recipe("sam_vit_b", ("neck",), pool=4, masks={"points": 16}).fingerprint("ab") == before
    assert make_recipe("lite_medsam", ("masks",)).fingerprint("ab")["masks"]["prompts"] == "boxes"
    assert make_recipe("sam_vit_b", ("masks",), preprocessing="medsam").masks.prompts == "boxes"
    assert make_recipe("sam2.1_hiera_tiny", ("masks",)).masks.predicted_iou == 0.8


@pytest.mark.parametrize(
    ("name", "taps", "rules", "said"),
    [
        ("sam_demo", ("masks",), {"side_px": 8}, "encoder.masks.side_px: got 8, expected 16 to 1024"),
        ("sam_demo", ("masks",), {"stability": 1.5}, "encoder.masks.stability: got 1.5, expected 0 to 1"),
        ("sam_demo", ("masks",), {"points": 0}, "encoder.masks.points: got 0, expected 1 to 256"),
        ("sam_demo", ("masks",), {"box_sides": []}, "box_sides: got \\[\\], expected at least one share"),
        ("sam_demo", ("masks",), {"prompts": "lines"}, "prompts: got 'lines', expected 'points' or 'boxes'"),
        ("sam_demo", ("masks",), {"point": 3}, "encoder.masks has no 'point'; valid: prompts, points"),
        ("sam_demo", ("masks@hflip",), {}, "masks have no views"),
        ("sam_demo", ("mask_scores",), {}, "has no tap 'mask_scores'"),
    ],
)
def test_what_cannot_be_is_refused(name: str, taps: tuple[str, ...], rules: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_recipe(name, taps, masks=rules)


def test_weights_without_a_mask_decoder_are_refused(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    bare = {key.removeprefix("image_encoder."): v for key, v in state.items() if key.startswith("image_encoder.")}
    torch.save(bare, tmp_path / "bare.pth")
    build_encoder("sam_demo", checkpoint=tmp_path / "bare.pth", taps=["neck"])
    with pytest.raises(CheckpointError, match="has no prompt encoder and mask decoder, only an image encoder"):
        build_encoder("sam_demo", checkpoint=tmp_path / "bare.pth", taps=["neck", "masks"])
    torn = {key: value for key, value in state.items() if key != "mask_decoder.iou_token.weight"}
    torch.save(torn, tmp_path / "torn.pth")
    with pytest.raises(CheckpointError, match=r"missing 1 \('mask_decoder.iou_token.weight'\)"):
        build_encoder("sam_demo", checkpoint=tmp_path / "torn.pth", taps=["masks"])
