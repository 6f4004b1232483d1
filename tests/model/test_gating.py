"""Gating a few images at a time is resizing the gate and multiplying, forward and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.model import gating
from pipeline.model.gating import gate_stage
from pipeline.model.geometry import cell_rows, find_corners, identity, sample_gate
from pipeline.model.slca import integrate


def moves(count, generator):
    """Affine maps far enough from the identity that some places lie beyond the image."""
    return identity(count, torch.device("cpu")) + 0.4 * torch.randn(count, 2, 3, generator=generator)


def slopes(gated, weights, inputs):
    return torch.autograd.grad((gated * weights).sum(), inputs)


@given(
    batch=st.integers(1, 5),
    cells=st.tuples(st.integers(1, 6), st.integers(2, 6)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    added=st.sampled_from([0, 1]),
    extents=st.sampled_from([None, (0.5, 1.0), (1.0, 0.7)]),
    layout=st.sampled_from([torch.channels_last, torch.contiguous_format]),
    at_a_time=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_it_is_resizing_and_multiplying(batch, cells, size, added, extents, layout, at_a_time, seed):
    generator = torch.Generator().manual_seed(seed)
    stage = torch.randn(batch, 3, *size, generator=generator).contiguous(memory_format=layout).requires_grad_()
    part = torch.rand(batch, 3, *cells, generator=generator).requires_grad_()
    affine = moves(batch, generator)
    rows = None if extents is None else torch.tensor([extents] * batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gating, "CACHED_BYTES", at_a_time * 4 * stage[0].numel())
        found = gate_stage(stage, added, part, affine, rows)
        weights = torch.randn(found.shape, generator=generator)
        given_back = slopes(found, weights, (stage, part))
    expected = integrate(stage, sample_gate(part, affine, rows, size), added)
    assert found.stride() == stage.stride()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for mine, wanted in zip(given_back, slopes(expected, weights, (stage, part)), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("added", [0, 1])
def test_its_gradients_are_those_of_the_numbers_themselves(added, monkeypatch):
    monkeypatch.setattr(gating, "CACHED_BYTES", 2 * 4 * 3 * 20)  # two images, then one
    generator = torch.Generator().manual_seed(0)
    stage = torch.randn(3, 3, 4, 5, dtype=torch.float64, generator=generator).requires_grad_()
    part = torch.rand(3, 3, 2, 3, dtype=torch.float64, generator=generator).requires_grad_()
    corners = find_corners(2 * torch.rand(3, 4, 5, 2, generator=generator) - 1, 2, 3)

    def gated(stage, part):
        return gating._Gating.apply(stage, cell_rows(part), corners.cells, corners.shares.double(), added)

    assert torch.autograd.gradcheck(gated, (stage, part))


def test_a_stage_in_half_precision_is_multiplied_by_a_gate_in_full():
    generator = torch.Generator().manual_seed(0)
    stage = torch.randn(2, 4, 6, 6, generator=generator).bfloat16().requires_grad_()
    part = torch.rand(2, 4, 3, 3, generator=generator).requires_grad_()
    affine = moves(2, generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gate_stage(stage, 1, part, affine, None)
    expected = stage * (1 + sample_gate(part, affine, None, (6, 6))).bfloat16()
    assert torch.equal(found, expected)
    weights = torch.ones_like(found)
    for mine, wanted in zip(
        slopes(found, weights, (stage, part)), slopes(expected, weights, (stage, part)), strict=True
    ):
        assert mine.dtype == wanted.dtype
        torch.testing.assert_close(mine, wanted)


def test_a_frozen_stage_leaves_the_gate_to_learn():
    part = torch.rand(2, 4, 3, 3).requires_grad_()
    gate_stage(torch.randn(2, 4, 6, 6), 1, part, moves(2, torch.Generator().manual_seed(0)), None).sum().backward()
    assert part.grad.abs().sum() > 0


def test_the_gated_stage_keeps_no_resized_gate():
    stage = torch.randn(2, 64, 28, 28).requires_grad_()
    part = torch.rand(2, 64, 4, 4).requires_grad_()
    kept = []

    def keep(tensor):
        if tensor.is_floating_point() and tensor is not stage:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gate_stage(stage, 1, part, moves(2, torch.Generator().manual_seed(0)), None)
    assert max(kept) <= 2 * 28 * 28 * 4  # the shares of four corners, whatever the channels
