"""The encoder's benchmark counts operations as torch does, and prints what it promises."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks import encoder as benchmark
from tests.encoders.seeded import TINY, official_encoder, seeded_state


def test_operations_are_those_that_torch_counts_in_the_official_module() -> None:
    architecture = dataclasses.replace(TINY, window=4)  # divides the grid, so that no padding is counted
    vit = official_encoder(architecture, seeded_state(architecture), architecture.input_px)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vit(torch.zeros(1, 3, 128, 128))
    relative_position = sum(
        2 * 2 * 64 * architecture.width * (8 if block in architecture.global_blocks else 4)
        for block in range(architecture.blocks)
    )
    assert benchmark.operations(architecture, 128) == counter.get_total_flops() - relative_position


def test_json_has_the_figures_that_are_compared_between_machines(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--json", "--model", "sam_demo", "--rounds", "1", "--device", "cpu"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["cpu_fp32_speedup"] > 0
    assert figures["cpu_bf16_speedup"] > 0
    assert figures["fp32_error"] <= 1e-5
    assert figures["tiny_fp32_speedup"] > 0
    assert figures["tiny_bf16_speedup"] > 0
    assert figures["tiny_fp32_error"] <= 1e-5
    assert figures["tiny_bf16_error"] <= 0.2
    assert figures["bf16_error"] <= 2e-2
    assert set(figures["variants"]) == {"official", "float32", "bfloat16"}
    assert not any(key.startswith("gpu") for key in figures)
