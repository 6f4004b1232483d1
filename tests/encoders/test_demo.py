"""The miniature SAM learns, repeats itself byte for byte, and is a checkpoint like any other."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from pipeline.data import demo_arrays, demo_objects
from pipeline.encoders import architecture_named, build_encoder, train_demo_encoder
from pipeline.encoders.masks.decoder import Decoder
from pipeline.encoders.masks.everything import Everything
from pipeline.encoders.masks.rules import MaskRules
from pipeline.encoders.masks.weights import decoder_state, fill
from pipeline.encoders.sam import demo
from pipeline.encoders.sam.prompted import draw_prompts, losses
from pipeline.encoders.sam.whole import draw_whole
from pipeline.encoders.untrained import write_whole
from pipeline.weights import read_weights
from tests.encoders.official_masks import best_ious, official_masks


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products wait for each other on a busy machine when they are shared between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lesions() -> tuple[np.ndarray, np.ndarray]:
    return demo_objects(320, 128, 11)


Steps = list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def trained(
    lesions: tuple[np.ndarray, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, demo.DemoReport, Steps]:
    """A checkpoint after a third of the usual steps, what training said of it, and how it reported on the way."""
    images, objects = lesions
    path = tmp_path_factory.mktemp("demo") / "weights" / "demo.pth"
    steps: Steps = []
    report = train_demo_encoder(
        images[32:],
        objects[32:],
        images[:32],
        objects[:32],
        path,
        steps=30,
        progress=lambda task, done, total, **info: steps.append((task, done, total)),
    )
    return path, report, steps


def encoded(path: Path, image: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """The neck (h, w, C) of a grey image, and the image as it was encoded."""
    encoder = build_encoder("sam_demo", checkpoint=path, taps=["neck"])
    colours = np.repeat(image[:, :, None], 3, 2)
    prepared = encoder.prepare(colours)
    return encoder.encode(prepared.pixels[None], torch.tensor([prepared.size]))["neck"][0].permute(1, 2, 0), colours


def test_training_finds_lesions_in_images_it_has_not_seen(
    trained: tuple[Path, demo.DemoReport, Steps], lesions: tuple[np.ndarray, np.ndarray]
) -> None:
    path, report, steps = trained
    assert report.dice > 0.75  # 100 steps reach .9; marking everything gives .15
    assert 0 <= report.recall <= 1
    assert report.seconds > 0
    assert report.steps == 30
    tasks = ("train sam_demo", 30), ("train sam_demo to answer prompts", 42)
    assert steps == [(task, step, total) for task, total in tasks for step in range(1, total + 1)]
    saved = torch.load(path, weights_only=True)
    assert {key.partition(".")[0] for key in saved} == {"image_encoder", "prompt_encoder", "mask_decoder"}
    buffer = saved["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
    assert report.parameters == sum(value.numel() for value in saved.values()) - buffer.numel()
    assert list(path.parent.iterdir()) == [path]
    assert encoded(path, lesions[0][0])[0].isfinite().all()


def test_its_masks_of_everything_are_the_official_ones(trained: tuple[Path, demo.DemoReport, Steps]) -> None:
    path, _, _ = trained
    miniature = architecture_named("sam_demo")
    prompts, masks = fill(miniature, path, decoder_state("sam_demo", path, read_weights(path)))
    prompts.input_image_size, prompts.image_embedding_size = (256, 256), (16, 16)
    decoder = Decoder(copy.deepcopy(prompts), masks, 256, 16)
    rules = MaskRules("points", points=8, predicted_iou=0.3, stability=0.5)  # half trained, it trusts few
    for image in demo_arrays(4, 256, seed=5)[0]:
        neck, colours = encoded(path, image)
        theirs = official_masks(prompts, masks, neck, colours, rules)
        with torch.no_grad():
            found, _ = Everything(decoder, rules, 256).masks(neck, (256, 256))
        assert len(found) == len(theirs) > 0
        assert best_ious(found.numpy(), np.stack([mask["segmentation"] for mask in theirs])).min() >= 0.95


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, lesions: tuple[np.ndarray, np.ndarray]) -> None:
    images, objects = lesions

    def train(name: str, seed: int) -> bytes:
        torch.manual_seed(np.random.default_rng().integers(1 << 30))  # the global generator has no part in it
        before = torch.get_rng_state()
        train_demo_encoder(images, objects, images[:2], objects[:2], tmp_path / name, seed=seed, steps=3)
        assert torch.equal(torch.get_rng_state(), before)
        return (tmp_path / name).read_bytes()

    first, again, other = train("a.pth", 5), train("b.pth", 5), train("c.pth", 6)
    assert first == again
    assert first != other


def test_dice_is_that_of_the_most_trusted_of_three_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.full((2, 4, 64, 64), -1.0)
    logits[0, 2, :, :32] = 1.0  # the left half
    logits[1, 2, :32] = 1.0  # the upper half
    logits[:, 3], logits[:, 0] = 1.0, 1.0
    asked: list[Tensor] = []

    def decode(sam: Sam, necks: Tensor, points: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        asked.append(points[0])
        return logits, torch.tensor([[0.9, 0.1, 0.8, 0.2]] * 2)  # the first is the single mask's

    monkeypatch.setattr(demo, "decode", decode)
    truth = np.zeros((2, 128, 128), bool)
    truth[0, :, :32] = True  # the left quarter: 2 * 1/4 / (1/2 + 1/4) = 2/3
    truth[1, 64:, :3] = True  # in the lower half: 0
    sam = draw_whole(architecture_named("sam_demo"), torch.Generator().manual_seed(0))
    dice = demo.dice_from_a_point(sam, torch.zeros(2, 64, 16, 16), torch.from_numpy(truth), seed=0)
    assert dice == pytest.approx((2 / 3 + 0) / 2)
    (x0, y0), (x1, y1) = asked[0][:, 0].tolist()
    assert truth[0, int(y0 / 2), int(x0 / 2)]
    assert truth[1, int(y1 / 2), int(x1 / 2)]


def test_recall_counts_images_with_a_stored_mask_that_is_the_lesion(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = torch.zeros(3, 1, 256, 256, dtype=torch.uint8)
    ranks[0, 0, :128], ranks[0, 0, :60, :60] = 1, 2  # a small mask lies on the large one and is no lesion
    ranks[1, 0, :128] = 1
    found = iter(ranks)
    monkeypatch.setattr(demo.Everything, "forward", lambda self, neck, size: (next(found), None))
    truth = np.zeros((3, 128, 128), bool)
    truth[0, :64] = True  # all of it but what lies on top: IoU .89
    truth[1, :31] = True  # IoU .48
    truth[2, :31] = True  # nothing was found
    sam = draw_whole(architecture_named("sam_demo"), torch.Generator().manual_seed(0))
    found_share = demo.recall_of_everything(sam, torch.zeros(3, 64, 16, 16), torch.from_numpy(truth))
    assert found_share == pytest.approx(1 / 3)


def test_losses_by_hand() -> None:
    """Of three masks the best counts; where there is no object, the predicted IoU alone."""
    logits = torch.full((2, 4, 4, 4), -30.0)
    truth = torch.zeros(2, 8, 8)
    truth[0, :, :4] = 1  # the left half
    logits[0, 0, :, :2] = 30.0  # the single mask is right
    logits[0, 2, :, :1] = 30.0  # one of three is half right, the others find nothing
    logits[1, 1] = 30.0
    of_masks, of_predicted = losses(logits, torch.full((2, 4), 0.5), truth)
    nothing = 30 / 2 + 1 - 1 / 9  # entropy of half the cells, and Dice with one added to both sides
    half_right = 30 / 4 + 1 - 9 / 13
    assert half_right < nothing
    torch.testing.assert_close(of_masks.item(), half_right / 2, rtol=1e-4, atol=0.0)  # and 0 for the second prompt
    iou = torch.tensor([[1, 0, 0.5, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(of_predicted, (iou - 0.5).square().mean())


def test_prompts_lie_on_their_objects() -> None:
    _, objects = demo_objects(8, 128, 3)
    prompts = draw_prompts(torch.from_numpy(objects), 256, torch.Generator().manual_seed(0))
    assert (prompts.points.shape, prompts.boxes.shape, prompts.truth.shape) == ((32, 1, 2), (8, 4), (40, 128, 128))
    for (x, y), truth in zip(prompts.points[:, 0].tolist(), prompts.truth[:24], strict=False):
        assert truth[int(y / 2), int(x / 2)]
    assert (prompts.truth[:8].numpy() == objects[:, 0]).all()
    for (x, y), within in zip(prompts.points[24:, 0].tolist(), objects, strict=True):
        assert not within[:, int(y / 2), int(x / 2)].any()
    assert not prompts.truth[24:32].any()
    for (left, top, right, bottom), truth in zip(prompts.boxes.tolist(), prompts.truth[32:], strict=True):
        rows, columns = (truth.any(axis).nonzero()[:, 0] * 2 for axis in (1, 0))
        exact = torch.tensor([columns[0], rows[0], columns[-1] + 2, rows[-1] + 2]).clamp(max=255)
        assert (torch.tensor([left, top, right, bottom]) - exact).abs().max() <= 20
        assert right > left
        assert bottom > top


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
