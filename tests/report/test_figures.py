"""Charts as SVG: what is drawn is what is in the numbers."""

from __future__ import annotations

import pytest

from pipeline.report.page.chart import Axis, Line, chart


def test_a_line_keeps_its_corners_and_loses_only_what_nobody_sees() -> None:
    straight = [(x / 1000, x / 1000) for x in range(1001)]
    corner = [*straight[:501], (0.5, 0.9), (1.0, 0.9)]
    for points, kept in ((straight, 2), (corner, 4)):
        drawn = chart([Line("a", points)], Axis("x"), Axis("y"), alt="a")
        path = drawn.split('d="M')[1].split('"')[0]
        assert path.count("L") == kept - 1


def test_bars_stand_at_the_points_between_their_ends() -> None:
    drawn = chart([Line("a", [(0, 0.5), (1, 0.5)], bars=[(0.0, 1.0), (0.25, 0.5)])], Axis("x"), Axis("y"), alt="a")
    bars = [part.split("/>")[0] for part in drawn.split("<line ") if 'class="line bar c0"' in part.split("/>")[0]]
    assert [bar.split(" class")[0] for bar in bars] == [
        'x1="52" y1="284" x2="52" y2="12"',
        'x1="388" y1="216" x2="388" y2="148"',
    ]
    assert 'class="line bar' not in chart([Line("a", [(0, 0.5), (1, 0.5)])], Axis("x"), Axis("y"), alt="a")


def test_ticks_are_round_and_within() -> None:
    assert Axis("x").ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Axis("epoch", 1, 8, whole=True).ticks() == [2, 4, 6, 8]
    assert Axis("epoch", 1, 2, whole=True).ticks() == [1, 2]
    assert all(0.37 <= tick <= 0.93 for tick in Axis("y", 0.37, 0.93).ticks())
