"""The miniature SAM learns, repeats itself byte for byte, and is a checkpoint like any other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.data import demo_arrays
from pipeline.encoders import build_encoder, train_demo_encoder
from pipeline.encoders.sam import demo
from pipeline.encoders.untrained import write_whole


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products wait for each other on a busy machine when they are shared between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lesions() -> tuple[np.ndarray, np.ndarray]:
    images, masks, _ = demo_arrays(320, 128, 11)
    return images, masks


def test_training_finds_lesions_in_images_it_has_not_seen(
    tmp_path: Path, lesions: tuple[np.ndarray, np.ndarray]
) -> None:
    images, masks = lesions
    path = tmp_path / "weights" / "demo.pth"
    steps: list[tuple[int, int]] = []
    report = train_demo_encoder(
        images[32:],
        masks[32:],
        images[:32],
        masks[:32],
        path,
        steps=30,
        progress=lambda task, done, total, **info: steps.append((done, total)),
    )
    assert report.dice > 0.75  # 100 steps reach .9; marking everything gives .15
    assert report.seconds > 0
    assert report.steps == 30
    assert steps == [(step, 30) for step in range(1, 31)]
    assert report.parameters == sum(value.numel() for value in torch.load(path, weights_only=True).values())
    assert list(path.parent.iterdir()) == [path]
    encoder = build_encoder("sam_demo", checkpoint=path, taps=["neck"])
    prepared = encoder.prepare(np.repeat(images[0][:, :, None], 3, 2))
    assert encoder.encode(prepared.pixels[None], torch.tensor([prepared.size]))["neck"].isfinite().all()


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, lesions: tuple[np.ndarray, np.ndarray]) -> None:
    images, masks = lesions

    def train(name: str, seed: int) -> bytes:
        torch.manual_seed(np.random.default_rng().integers(1 << 30))  # the global generator has no part in it
        before = torch.get_rng_state()
        train_demo_encoder(images, masks, images[:2], masks[:2], tmp_path / name, seed=seed, steps=3)
        assert torch.equal(torch.get_rng_state(), before)
        return (tmp_path / name).read_bytes()

    first, again, other = train("a.pth", 5), train("b.pth", 5), train("c.pth", 6)
    assert first == again
    assert first != other


def test_dice_is_that_of_thresholded_masks_at_full_size(
    lesions: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted = torch.full((3, 64, 64), -1.0)
    predicted[0, :, :32] = 1.0  # the left half
    predicted[1, :32] = 1.0  # the upper half
    monkeypatch.setattr(demo, "_predict", lambda encoder, head, images: predicted)
    truth = np.zeros((3, 64, 64), bool)
    truth[0, :, :16] = True  # the left quarter: 2 * 1/4 / (1/2 + 1/4) = 2/3
    truth[1, 32:] = True  # the lower half: 0; and nothing found where nothing is: 1
    dice = demo._dice(nn.Identity(), nn.Identity(), np.zeros((3, 64, 64), np.uint8), truth)
    assert dice == pytest.approx((2 / 3 + 0 + 1) / 3)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "demo.pth"
    path.write_bytes(b"old")

    def fail(file: IO[bytes]) -> None:
        file.write(b"half of the new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
