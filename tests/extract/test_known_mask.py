"""The known mask as a tap, and encoders that have learnt nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cache
from pipeline.config.schema import load_config
from pipeline.data import load_medmnist, pixel_digest, read_image
from pipeline.encoders import build_encoder, make_recipe, write_untrained_encoder
from pipeline.encoders.known_mask.encoder import KnownMask, map_of
from pipeline.encoders.known_mask.recipe import CHANNELS
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.extract.extract import extract
from pipeline.progress import silent
from pipeline.stages import commands, inputs, stores
from pipeline.stages.inputs import finished

MASK = (
    "encoder.name=mask",
    "encoder.taps=[mask]",
    "encoder.pool=1",
    "store.path=features/mask.zarr",
    "model.gates=[{tap: mask, stage: stage1}]",
    "run=runs/mask",
    "train.epochs=1",
)
UNTRAINED = (
    "encoder.checkpoint=weights/untrained.pth",
    "encoder.training={steps: 0, seed: 3}",
    "store.path=features/untrained.zarr",
)


@pytest.fixture
def config(work, monkeypatch):
    """Reads the tiny configuration with overrides, in a folder where `prepare` has run."""
    monkeypatch.chdir(work)
    return lambda *overrides: load_config(Path("tiny.yaml"), overrides)


def test_channels_by_hand():
    mask = np.zeros((40, 80), bool)
    mask[10:20, 20:40] = True  # the second quarter across, the second quarter down
    channels = dict(zip(CHANNELS, map_of(mask, 4).numpy(), strict=True))
    inside = np.zeros((4, 4))
    inside[1, 1] = 1
    np.testing.assert_array_equal(channels["inside"], inside)
    np.testing.assert_array_equal(channels["outside"], 1 - inside)
    assert channels["around"][1, 1] == 0
    assert channels["around"][0, 1] == pytest.approx(0.8)  # 8 of the 10 rows above
    assert channels["around"][1, 3] == 0
    assert channels["edge"][0, 1] == 1  # the outline runs along its lower side, from one end to the other
    assert channels["edge"][1, 0] == pytest.approx(10 / 200 * 15)  # 10 px in a cell of 10 x 20, whose mean side is 15
    assert channels["edge"][3, 3] == channels["edge"][1, 1] == 0


def test_a_mask_that_fills_the_image_or_none_of_it_stays_finite():
    for value in (0.0, 1.0):
        channels = map_of(np.full((30, 20), bool(value)), 8)
        assert channels.shape == (4, 8, 8)
        assert (channels[0] == value).all()
        assert (channels[1] == 0).all()


def test_the_grid_is_that_of_sam():
    assert make_recipe("mask", ("mask",)).shapes == {"mask": (4, 16, 16)}
    assert make_recipe("mask", ("mask",), 512, 2).shapes == {"mask": (4, 16, 16)}
    with pytest.raises(ConfigError, match=r"encoder.taps: got \['neck'\]; the encoder 'mask' has the taps mask,"):
        make_recipe("mask", ("neck",))
    with pytest.raises(ConfigError, match="100 px do not divide into cells of 16 x 2 px; choose a multiple of 32"):
        make_recipe("mask", ("mask",), 100, 2)


def test_a_store_of_masks_is_a_store_like_any_other(config):
    report = commands.extract(config(*MASK), silent)
    assert (report["rows"], report["encoded"], report["set_aside"]) == (48, 48, {})
    table = {row["image"]: row for row in csv.DictReader(Path("data/demo/demo.csv").read_text().splitlines())}
    with cache.open_store("features/mask.zarr") as store:
        assert {tap: (s.channels, s.height, s.width) for tap, s in store.taps.items()} == {"mask": (4, 16, 16)}
        assert store.fingerprint.fields["encoder"] == "mask"
        assert len(store.fingerprint.fields["masks_sha256"]) == 64
        for row in (0, 17, 47):
            sample = table[store.ids[row]]
            mask = read_image(Path("data/demo") / sample["mask"])[:, :, 0] > 0
            np.testing.assert_array_equal(store.read([row])["mask"][0], map_of(mask, 16).numpy().astype("float16"))
            assert store.digests[row].tobytes() == pixel_digest(read_image(Path("data/demo") / sample["image"]))
        changed = Path("data/demo") / table[store.ids[3]]["mask"]
    assert cache.verify(Path("features/mask.zarr")) == ()
    assert commands.extract(config(*MASK), silent)["encoded"] == 0
    version = cache.info(Path("features/mask.zarr")).version
    shard = next(Path("features/mask.zarr/mask").glob("c.*"))
    shard.write_bytes(b"\1" + shard.read_bytes()[1:])
    assert stores.repair(config(*MASK), silent, Path("features/mask.zarr"))["repaired"] == 1
    assert cache.info(Path("features/mask.zarr")).version == version
    assert finished(config(*MASK), silent) is None  # the look without torch leaves masks to the look with it
    assert commands.train(config(*MASK), silent)["epoch"] == 1
    assert 0 <= commands.evaluate(config(*MASK), silent)["auc"] <= 1

    pixels = np.asarray(Image.open(changed)).copy()
    pixels[:4, :4] = 255
    Image.fromarray(pixels).save(changed)
    with pytest.raises(cache.FingerprintMismatchError, match="masks_sha256"):
        commands.extract(config(*MASK), silent)
    assert commands.extract(config(*MASK), silent, replace=True)["encoded"] == 48


def test_new_images_have_no_mask(config):
    with pytest.raises(ConfigError, match=r"encoder.name: 'mask' reads the data set's own masks, so it encodes"):
        inputs.build_encoder(config(*MASK))


def test_a_data_set_without_masks_is_refused(tmp_path):
    random = np.random.default_rng(0)
    splits = ("train", "val", "test")
    images = {f"{split}_images": random.integers(0, 255, (4, 28, 28), dtype=np.uint8) for split in splits}
    labels = {f"{split}_labels": np.arange(4)[:, None] % 2 for split in splits}
    np.savez(tmp_path / "few.npz", **images, **labels)
    with pytest.raises(DataError, match=r"has no masks, and the encoder 'mask' makes its tap from them: name data"):
        extract(
            load_medmnist(tmp_path / "few.npz"),
            KnownMask(make_recipe("mask", ("mask",))),
            tmp_path / "f.zarr",
            reading={},
        )


def test_an_untrained_encoder_is_made_once_and_told_by_its_seed(config):
    first = commands.prepare(config(*UNTRAINED), silent)["encoder"]
    made = Path("weights/untrained.pth").stat().st_mtime_ns
    assert commands.prepare(config(*UNTRAINED), silent)["encoder"] == first
    assert Path("weights/untrained.pth").stat().st_mtime_ns == made
    assert json.loads(Path("weights/untrained.json").read_text())["sha256"] == first["sha256"]
    assert commands.extract(config(*UNTRAINED), silent)["rows"] == 48
    with cache.open_store("features/untrained.zarr") as store:
        for feature in store.read(range(8)).values():
            assert np.isfinite(feature).all()
            assert feature.astype("float32").std() > 0.01
        assert store.fingerprint.fields["weights_sha256"] == first["sha256"]
    another = commands.prepare(config(*UNTRAINED, "encoder.training.seed=4"), silent)["encoder"]
    assert another["sha256"] != first["sha256"]


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("beside", [None, b'{"epochs": 3}', b"[1, 2]", b"{torn", b"\xff", "another's"])
def test_weights_of_ones_own_are_not_overwritten(config, beside, steps):
    target, record = Path("weights/mine.pth"), Path("weights/mine.json")
    target.write_bytes(Path("weights/sam_demo.pth").read_bytes())
    record.unlink(missing_ok=True)
    if beside == "another's":  # what was made here was swapped for a file of one's own
        made = json.loads(Path("weights/sam_demo.json").read_text())
        record.write_text(json.dumps({**made, "sha256": "0" * 64}))
    elif beside is not None:
        record.write_bytes(beside)
    with pytest.raises(CheckpointError, match=rf"were not made here, and encoder.training.steps is {steps}, which"):
        commands.prepare(config("encoder.checkpoint=weights/mine.pth", f"encoder.training.steps={steps}"), silent)
    assert target.read_bytes() == Path("weights/sam_demo.pth").read_bytes()


def test_weights_that_a_kill_left_half_recorded_are_made_again(config, monkeypatch):
    wanted = config("encoder.checkpoint=weights/half.pth", "encoder.training={steps: 0, seed: 5}")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.encoders.weights_sha256", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # after the weights were written, before their digest was
            commands.prepare(wanted, silent)
    left = Path("weights/half.pth").read_bytes()
    assert "sha256" not in json.loads(Path("weights/half.json").read_text())
    made = commands.prepare(wanted, silent)["encoder"]
    assert Path("weights/half.pth").read_bytes() == left
    assert json.loads(Path("weights/half.json").read_text())["sha256"] == made["sha256"]


def test_the_same_seed_draws_the_same_weights_without_touching_torchs_own(tmp_path):
    before = torch.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_untrained_encoder("sam_demo", tmp_path / name, seed=seed)
    assert torch.equal(before, torch.get_rng_state())
    first, same, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == same != other
    encoder = build_encoder("sam_demo", checkpoint=tmp_path / "a", taps=["neck"])
    assert set(encoder.taps) == {"neck"}
