"""Every form of attention equals the official one, which builds the whole bias."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from segment_anything.modeling.image_encoder import add_decomposed_rel_pos
from torch import Tensor

from pipeline.encoders.sam import attention
from pipeline.encoders.sam import vit as sam_vit
from tests.encoders.seeded import TINY, official_encoder, relative_error, seeded_state

B, HEADS, H, W, D = 3, 2, 4, 6, 8


@pytest.fixture
def tensors() -> tuple[Tensor, ...]:
    """q, k, v, and the relative positions of rows and of columns."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, HEADS, H * W, D)] * 3 + [(2 * H - 1, D), (2 * W - 1, D)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def official(q: Tensor, k: Tensor, v: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    """The lines of the official `Attention.forward` between its two projections: (B, tokens, heads, d)."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = (q * D**-0.5) @ k.transpose(-2, -1)
    scores = add_decomposed_rel_pos(scores, q, rel_pos_h, rel_pos_w, (H, W), (H, W))
    return (scores.softmax(-1) @ v).view(B, HEADS, H * W, D).transpose(1, 2)


@pytest.mark.parametrize("limit", [1, 30, 24 * 24, 24 * 24 * HEADS, 10**6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_chunks_of_any_size_give_the_official_attention(
    tensors: tuple[Tensor, ...], limit: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_BIAS_PER_THREAD", limit)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    q, k, v, *tables = (tensor.to(dtype) for tensor in tensors)
    out = attention.chunked_attention(q, k, v, *attention.relative_terms(q, *tables, (H, W)))
    assert out.dtype == dtype
    assert relative_error(out, official(*tensors)) <= tolerance


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # the unfused reference is meant
def test_the_fused_form_gives_the_official_attention(tensors: tuple[Tensor, ...]) -> None:
    q, k, v, *tables = tensors
    out = attention.fused_attention(q, k, v, *attention.relative_terms(q, *tables, (H, W)))
    assert relative_error(out, official(*tensors)) <= 1e-6


def test_all_blocks_compile_to_one_graph_for_windows_and_one_for_the_grid() -> None:
    torch.compiler.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(sam_vit.run_block, dynamic=False, fullgraph=True, backend=count)
    module = official_encoder(TINY, seeded_state(TINY), TINY.input_px)
    x = y = torch.randn(2, 8, 8, TINY.width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for block in module.blocks:
            x, y = compiled(block, x), block(y)
    assert graphs == 2
    assert relative_error(x, y) <= 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator: the compiled form runs on one only")
def test_the_compiled_form_on_a_gpu_gives_the_official_features() -> None:
    torch.backends.cudnn.allow_tf32 = False  # of the official module; ours does not round either
    wide = dataclasses.replace(TINY, width=32)  # torch's kernel wants heads of 16 channels and more
    module = official_encoder(wide, seeded_state(wide), wide.input_px).cuda()
    compiled = torch.compile(sam_vit.run_block, dynamic=False)
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(2)).cuda()
    with torch.no_grad():
        *_, neck = sam_vit.feature_maps(module, images, compiled)
        assert relative_error(neck.permute(0, 3, 1, 2), module(images)) <= 1e-4
