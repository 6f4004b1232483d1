"""How large the local average of each tap is, whatever grids an encoder has."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import cache
from pipeline.encoders.pooling import Pool, average, choose_pools, pool_steps
from pipeline.errors import ConfigError

PYRAMID = {"patch": 256, "early": 128, "neck": 64, "neck@hflip": 64}


@pytest.mark.parametrize(
    ("asked", "pools"),
    [
        (None, (16, 8, 4, 4)),
        (4, (16, 8, 4, 4)),
        (1, (4, 2, 1, 1)),
        (64, (256, 128, 64, 64)),
        ({"neck": 1}, (16, 8, 1, 1)),
        ({"neck": 1, "neck@hflip": 2, "patch": 256}, (256, 8, 1, 2)),
    ],
)
def test_pools_of_grids_that_differ(asked: Pool, pools: tuple[int, ...]) -> None:
    assert choose_pools("some", PYRAMID, 64, asked) == dict(zip(PYRAMID, pools, strict=True))


@pytest.mark.parametrize(("grid", "pool"), [(4, 1), (13, 1), (16, 1), (17, 17), (20, 2), (32, 2), (48, 3), (512, 32)])
def test_without_a_pool_a_side_is_16_or_the_largest_below_that_divides(grid: int, pool: int) -> None:
    assert choose_pools("some", {"tap": grid}, grid, None) == {"tap": pool}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (3, "a pool of 3 does not divide the 64x64 grid of some; valid: 1, 2, 4, 8, 16, 32, 64"),
        ({"early": 3}, "a pool of 3 does not divide the 128x128 grid of tap 'early'; valid: 1, 2, 4"),
        ({"late": 2}, "encoder.pool names 'late', which is no tap here; the taps are patch, early, neck, neck@hflip"),
    ],
)
def test_a_pool_that_does_not_fit_is_refused(asked: Pool, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_pools("some", PYRAMID, 64, asked)
    assert said in str(caught.value)


def test_a_finer_grid_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ConfigError, match="63x63 grid of tap 'early' of some does not come down to a side of 8"):
        choose_pools("some", {"early": 63, "late": 16}, 16, 2)


def test_the_average_is_that_of_squares_in_the_steps_of_a_conversion() -> None:
    maps = torch.randn(2, 24, 24, 3, generator=torch.Generator().manual_seed(0))
    found = average(maps, 12, torch.float32)
    torch.testing.assert_close(found, F.avg_pool2d(maps.permute(0, 3, 1, 2), 12))
    assert [pool_steps(pool) for pool in range(1, 100)] == [cache.pool_steps(pool) for pool in range(1, 100)]
