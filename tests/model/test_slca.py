"""SLCA against a gate computed by hand, a loop over cells, and squeeze-and-excitation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import ConfigError
from pipeline.model.slca import SLCA, Standardise, factor, integrate, is_block, spread


def loop_reference(slca: SLCA, feature: Tensor) -> Tensor:
    """Cell by cell, number by number: the equation in `SLCA`'s docstring."""
    batch, channels, h, w = feature.shape
    k = slca.pool
    w1, b1 = slca.squeeze.weight[:, :, 0, 0], slca.squeeze.bias
    w2, b2 = slca.excite.weight[:, :, 0, 0], slca.excite.bias
    gate = torch.zeros(batch, len(w2), math.ceil(h / k), math.ceil(w / k), dtype=feature.dtype)
    for b in range(batch):
        for i in range(gate.shape[2]):
            for j in range(gate.shape[3]):
                window = feature[b, :, i * k : (i + 1) * k, j * k : (j + 1) * k]
                cell = torch.stack([window[c].sum() / window[c].numel() for c in range(channels)])
                if isinstance(slca.norm, Standardise):
                    cell = torch.stack([cell[c] * slca.norm.scale[c] + slca.norm.shift[c] for c in range(channels)])
                elif slca.norm is not None:
                    among = ((cell - cell.mean()) ** 2).mean()
                    cell = (cell - cell.mean()) / torch.sqrt(among + slca.norm.eps) * slca.norm.weight + slca.norm.bias
                hidden = torch.stack([(w1[m] * cell).sum() + b1[m] for m in range(len(w1))]).clamp(min=0)
                logits = torch.stack([(w2[s] * hidden).sum() + b2[s] for s in range(len(w2))])
                gate[b, :, i, j] = 1 / (1 + torch.exp(-logits))
    return gate


@settings(max_examples=25, deadline=None)
@given(
    pool=st.integers(1, 5),
    grid=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    channels=st.integers(1, 6),
    reduction=st.integers(1, 4),
    norm=st.sampled_from(["standardise", "layer", "none"]),
    seed=st.integers(0, 9999),
)
def test_slca_equals_a_loop_over_cells(pool, grid, channels, reduction, norm, seed):
    torch.manual_seed(seed)
    slca = SLCA(channels, 3, pool=pool, reduction=reduction, norm=norm).double()
    slca.fit([(torch.randn(2, channels, *grid, dtype=torch.float64), None)])
    for parameter in slca.parameters():
        nn.init.normal_(parameter)
    feature = torch.randn(2, channels, *grid, dtype=torch.float64)
    gate, _ = slca(feature)
    torch.testing.assert_close(gate, loop_reference(slca, feature), rtol=1e-10, atol=1e-12)


def test_the_gate_is_the_one_computed_by_hand():
    slca = SLCA(2, 1, pool=2, reduction=2, norm="none")
    with torch.no_grad():
        slca.squeeze.weight[:] = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1)
        slca.squeeze.bias[:] = 1.0
        slca.excite.weight[:] = 0.5
        slca.excite.bias[:] = -1.0
    feature = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]], [[0.0, 2.0], [2.0, 0.0]]]])  # means 4 and 1
    gate, extents = slca(feature)
    # hidden = relu(2 * 4 - 1 * 1 + 1) = 8, logit = 0.5 * 8 - 1 = 3
    assert gate.shape == (1, 1, 1, 1)
    assert gate.item() == pytest.approx(1 / (1 + math.exp(-3)))
    assert extents is None


def test_a_pool_that_covers_the_grid_is_squeeze_and_excitation():
    torch.manual_seed(0)
    slca = SLCA(8, 5, pool=64, reduction=2, norm="none")
    feature = torch.randn(3, 8, 16, 16)
    squeezed = feature.mean(dim=(2, 3))
    hidden = torch.relu(F.linear(squeezed, slca.squeeze.weight[:, :, 0, 0], slca.squeeze.bias))
    excited = torch.sigmoid(F.linear(hidden, slca.excite.weight[:, :, 0, 0], slca.excite.bias))
    torch.testing.assert_close(slca(feature)[0][:, :, 0, 0], excited)


def test_squeeze_and_excitation_does_not_see_the_padding():
    torch.manual_seed(0)
    slca = SLCA(4, 5, pool=16, reduction=1, norm="layer")
    feature = torch.randn(2, 4, 16, 16)
    extents = torch.tensor([[0.5, 1.0], [1.0, 0.25]])
    gate, _ = slca(feature, extents)
    feature[0, :, 8:], feature[1, :, :, 4:] = 1e4, -1e4
    torch.testing.assert_close(slca(feature, extents)[0], gate)
    assert not torch.allclose(slca(feature)[0], gate)


def test_pooling_before_the_store_changes_nothing():
    torch.manual_seed(0)
    pooling, pooled = SLCA(6, 5, pool=4), SLCA(6, 5, pool=1)
    pooled.load_state_dict(pooling.state_dict())
    feature = torch.randn(2, 6, 64, 64)
    assert torch.equal(pooling(feature)[0], pooled(F.avg_pool2d(feature, 4))[0])


def test_a_window_that_sticks_out_says_how_far_its_cell_is_image():
    gate, extents = SLCA(3, 5, pool=4)(torch.randn(2, 3, 7, 8))
    assert gate.shape == (2, 5, 2, 2)
    assert extents.tolist() == [[7 / 8, 1.0]] * 2


def test_half_precision_features_are_taken():
    slca = SLCA(3, 5, pool=2)
    feature = torch.randn(2, 3, 8, 8)
    gate, _ = slca(feature.half())
    assert gate.dtype == torch.float32
    torch.testing.assert_close(gate, slca(feature)[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("mix", "identity_start", "expected"),
    [
        ("residual", False, 2 + 2 * 0.25),
        ("multiply", False, 2 * 0.25),
        ("residual", True, 2 + 2 * (0.25 - 0.5)),
        ("multiply", True, 2 * 2 * 0.25),
    ],
)
def test_the_ways_to_integrate(mix, identity_start, expected):
    resized, added = factor(torch.tensor(0.25), mix, identity_start=identity_start)
    assert integrate(torch.tensor(2.0), resized, added).item() == expected


@pytest.mark.parametrize("mix", ["residual", "multiply"])
def test_the_identity_start_leaves_the_stage_alone_and_still_learns(mix):
    torch.manual_seed(0)
    slca = SLCA(6, 5, pool=2, identity_start=True)
    stage, feature = torch.randn(2, 5, 4, 4), torch.randn(2, 6, 8, 8)
    gated = integrate(stage, *factor(slca(feature)[0], mix, identity_start=True))
    assert torch.equal(gated, stage)
    gated.square().sum().backward()
    assert slca.excite.weight.grad.abs().sum() > 0


def scaled_features(scale: float, count: int = 40, channels: int = 64) -> Tensor:
    """Smooth maps, as an encoder gives: each channel has a scale and a level of its own, around `scale`."""
    generator = torch.Generator().manual_seed(1)
    smooth = F.interpolate(torch.randn(count, channels, 4, 4, generator=generator), size=12, mode="bicubic")
    sizes = scale * torch.exp(torch.randn(channels, 1, 1, generator=generator) / 2)
    levels = 3 * scale * torch.randn(channels, 1, 1, generator=generator)
    return smooth * sizes + levels


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [0.09, 1.0, 10.0])
def test_gates_start_with_a_spread_whatever_the_scale_of_the_features(scale, seed):
    features = scaled_features(scale)
    torch.manual_seed(seed)
    slca = SLCA(64, 32, pool=1)
    slca.fit((part, None) for part in features[:30].split(8))
    found = spread(slca(features[30:])[0], None).mean().item()
    assert 0.08 < found < 0.25  # a sigmoid of a standard normal has 0.21, and one of a flat argument 0


def test_the_norm_gives_each_channel_mean_0_and_variance_1_over_what_is_image():
    features, extents = scaled_features(0.09, count=9), torch.tensor([[1.0, 0.55]]).expand(9, 2)
    features[:, :, :, 7:] = 1e4  # of the 12 columns 6.6 are image
    slca = SLCA(64, 5, pool=1)
    slca.fit((f, e) for f, e in zip(features.split(4), extents.split(4), strict=True))
    cells = slca.norm(features.flatten(2).transpose(1, 2)).view(9, 12, 12, 64)
    weights = torch.tensor([1.0] * 6 + [0.6] + [0.0] * 5).expand(9, 12, 12)[..., None]
    mean = (cells * weights).sum((0, 1, 2)) / weights.sum()
    variance = ((cells - mean).square() * weights).sum((0, 1, 2)) / weights.sum()
    torch.testing.assert_close(mean, torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(variance, torch.ones(64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("level", [0.0, 300.0])
def test_a_channel_that_does_not_vary_says_nothing_and_blows_nothing_up(level):
    features = scaled_features(1.0)
    features[:, 7] = level + 1e-4 * level * torch.rand(40, 12, 12)  # below what float16 can tell apart
    slca = SLCA(64, 32, pool=1)
    slca.fit([(features, None)])
    assert slca.norm.scale[7] == slca.norm.shift[7] == 0
    gate, _ = slca(features)
    assert gate.isfinite().all()
    features[:, 7] = 1e5
    assert torch.equal(slca(features)[0], gate)


def test_no_features_at_all_leave_the_norm_without_numbers_that_are_none():
    slca = SLCA(4, 5, pool=1)
    slca.fit([(torch.randn(2, 4, 3, 3), torch.zeros(2, 2))])
    assert slca(torch.randn(1, 4, 3, 3))[0].isfinite().all()


def test_the_spread_is_the_deviation_over_image_cells_and_its_mean_over_channels():
    gate = torch.tensor([[[[0.2, 0.4], [0.6, 0.8]], [[0.5, 0.5], [0.5, 0.5]]]])  # deviations 0.05 ** 0.5 and 0
    assert spread(gate, None).tolist() == pytest.approx([0.05**0.5 / 2])
    upper_row = torch.tensor([[0.5, 1.0]])
    assert spread(gate, upper_row).tolist() == pytest.approx([0.1 / 2])


def test_taps_of_blocks_are_known():
    taps = ["patch", "early", "middle", "late", "block:31", "neck", "own"]
    assert [tap for tap in taps if is_block(tap)] == ["early", "middle", "late", "block:31"]


def test_more_reduction_than_channels_keeps_one_hidden_channel():
    assert SLCA(3, 5, reduction=16).squeeze.out_channels == 1


@pytest.mark.parametrize("wrong", [{"pool": 0}, {"reduction": 0}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ConfigError, match="is 0: give a whole number of at least 1"):
        SLCA(3, 5, **wrong)
