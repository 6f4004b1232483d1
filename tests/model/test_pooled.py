"""Pooled features by hand, padding left out, and what a head makes of them beside an embedding or alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torchvision.models

from pipeline.errors import ConfigError
from pipeline.model.backbones import BACKBONES, build_backbone
from pipeline.model.classifier import Classifier, ModelOptions
from pipeline.model.pooled import Pooled, pool
from pipeline.model.uses import Seen

TAPS = {"late": (4, 6, 6), "neck": (2, 3, 3)}
ALONE = ModelOptions(backbone="none", gates=(), fuse=("late", "neck"))


def features_of(batch, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {tap: torch.randn(batch, *shape, generator=random) for tap, shape in TAPS.items()}


def test_pooled_by_hand():
    feature = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[0.0, 0.0], [0.0, -4.0]]]])
    spread = [np.std([1, 2, 3, 6]), np.std([0, 0, 0, -4])]
    assert pool(feature)[0].tolist() == pytest.approx([3.0, -1.0, 6.0, 0.0, *spread])
    part = torch.tensor([[1.0, 0.5]])  # the left column is image
    assert pool(feature, part)[0].tolist() == pytest.approx([2.0, 0.0, 3.0, 0.0, 1.0, 0.0])


def test_padding_takes_no_part_whatever_it_holds():
    feature = torch.randn(3, 5, 8, 8)
    extents = torch.tensor([[1.0, 0.5], [0.40, 1.0], [0.01, 0.01]])  # 8 x 4 cells, 3 x 8 (3.2 rows), the first alone
    cut = [feature[:1, :, :, :4], feature[1:2, :, :3], feature[2:, :, :1, :1]]
    expected = torch.cat([pool(part) for part in cut])
    feature[0, :, :, 4:], feature[1, :, 3:], feature[2, :, 1:, 1:] = torch.nan, torch.inf, 1e30
    torch.testing.assert_close(pool(feature, extents), expected)
    assert pool(feature, extents)[2, 10:].tolist() == [0.0] * 5  # one cell has no spread


def test_a_cell_counts_from_a_half_on():
    feature = torch.arange(8.0).reshape(1, 1, 8, 1)
    highest = [pool(feature, torch.tensor([[rows / 8, 1.0]]))[0, 1].item() for rows in (3.0, 3.4, 3.6, 4.0)]
    assert highest == [2.0, 2.0, 3.0, 3.0]


def test_training_samples_are_standard_and_a_number_that_never_varies_is_zero():
    pooled = Pooled(TAPS)
    features = features_of(50)
    features["late"] = features["late"] * 1000 + 500
    features["neck"][:, 1] = 0.3
    pooled.fit(torch.cat([pool(features[tap]) for tap in TAPS], dim=1))
    said = pooled(features).double()
    constant = [12 + 1, 12 + 3, 12 + 5]  # mean, maximum and deviation of the neck's second channel
    varying = [number for number in range(pooled.size) if number not in constant]
    torch.testing.assert_close(said[:, varying].mean(dim=0), torch.zeros(15, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(said[:, varying].std(dim=0, correction=0), torch.ones(15, dtype=torch.float64))
    assert said[:, constant].abs().max() < 1e-5


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "swin_v2_t", "convnext_tiny", "efficientnet_v2_s"])
def test_late_fusion_starts_as_the_plain_classifier_and_then_differs(name):
    torch.manual_seed(0)
    plain = torchvision.models.get_model(name, weights=None, num_classes=3).eval()
    torch.manual_seed(0)
    fused = Classifier(ModelOptions(backbone=name, gates=(), fuse=("late", "neck")), TAPS, outputs=3).eval()
    images, features = torch.randn(2, 3, 64, 64), features_of(2)
    torch.testing.assert_close(fused(images, features), plain(images), rtol=1e-5, atol=1e-6)
    weight = list(fused.backbone.head.parameters())[-2]
    embedding = weight.shape[1] - 18
    with torch.no_grad():
        weight[:, embedding:] = torch.randn(3, 18)
    expected = plain(images) + fused.pooled(features) @ weight[:, embedding:].T
    torch.testing.assert_close(fused(images, features), expected, rtol=1e-5, atol=1e-5)


def test_every_backbone_gives_its_embedding_and_its_last_layer():
    small = [name for name in BACKBONES if not name.endswith(("_l", "_large", "_b", "_base", "101_32x8d", "101_64x4d"))]
    for name in (*small, "timm:resnet18", "timm:swin_tiny_patch4_window7_224"):
        side = 224 if name.startswith("timm") else 64
        backbone = build_backbone(name, outputs=3, beside=5).eval()
        x = torch.zeros(1, 3, side, side)
        for stage in backbone.stages:
            x = stage(x)
        embedding = backbone.embed(x)
        assert embedding.ndim == 2
        assert backbone.classify(torch.cat([embedding, torch.zeros(1, 5)], dim=1)).shape == (1, 3), name


def test_without_a_backbone_it_is_one_linear_layer_on_pooled_features_and_sees_no_image():
    alone = Classifier(ALONE, TAPS, outputs=3)
    assert sum(p.numel() for p in alone.parameters()) == 3 * 18 + 3
    features, extents = features_of(4), torch.tensor([[1.0, 0.5]] * 4)
    assert alone(None, features).tolist() == [[0.0] * 3] * 4
    alone(None, features, extents).logsumexp(1).sum().backward()
    assert all(p.grad is not None for p in alone.parameters())
    layer = alone.backbone.head[-1]
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 18))
    expected = layer(torch.cat([pool(features[tap], extents) for tap in TAPS], dim=1))
    torch.testing.assert_close(alone.head(None, Seen(features, extents)), expected)
    counts = alone.flop_counts()
    assert counts == {"backbone": 2 * 3 * 18, "slca": 0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dataclasses.replace(ALONE, fuse=("later",)), "'later', which the store does not hold; it holds: late, neck"),
        (dataclasses.replace(ALONE, fuse=("neck", "neck")), "names a tap twice"),
        (dataclasses.replace(ALONE, fuse=()), "nothing to classify: name taps in fuse"),
        (dataclasses.replace(ALONE, gates=(("neck", "stage1"),)), "gates have no stage to sit on"),
        (dataclasses.replace(ALONE, weights="imagenet"), "nothing to load 'imagenet' into"),
    ],
)
def test_what_cannot_be_built_is_said(options, said):
    with pytest.raises(ConfigError, match=said):
        Classifier(options, TAPS, outputs=2)
