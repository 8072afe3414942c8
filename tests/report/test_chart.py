import json
import math
import random
import re

import pytest

from research.report.chart import line_chart, smoothed, thinned, ticks


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.12, 0.93, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1.4, 2.6, [1.0, 1.5, 2.0, 2.5, 3.0]),
        (0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
        (3, 3, [1, 2, 3, 4, 5]),
        (0, 0, [-0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6]),
    ],
)
def test_ticks_are_round_and_enclose_the_range(low, high, expected):
    found = ticks(low, high, 5)
    assert found[0] <= low
    assert found[-1] >= high
    assert found == pytest.approx(expected)


def test_thinning_keeps_ends_and_extremes():
    points = [(step, 0.0) for step in range(10_000)]
    points[4321] = (4321, 7.0)
    points[8765] = (8765, -3.0)
    kept = thinned(points, 500)
    assert len(kept) <= 510
    assert {points[0], points[-1], points[4321], points[8765]} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:100], 500) == points[:100]


def test_only_a_noisy_series_is_smoothed_and_its_mean_stays():
    rng = random.Random(0)
    noisy = [(step, 5.0 + rng.gauss(0, 1)) for step in range(400)]
    smooth = smoothed(noisy)
    inner = [value for _, value in smooth[20:-20]]
    assert max(abs(value - 5.0) for value in inner) < 1.0
    assert smoothed([(step, math.exp(-step / 50)) for step in range(400)]) == []
    assert smoothed(noisy[:10]) == []


def test_higher_values_are_drawn_higher_and_points_stay_inside():
    svg = line_chart("loss", [(0, 1.0), (10, 3.0), (20, math.nan), (30, 2.0)])
    points = json.loads(re.search('data-points="([^"]*)"', svg)[1].replace("&quot;", '"'))
    assert [row[2] for row in points] == [0, 10, 30]
    ys = [row[1] for row in points]
    assert ys[1] < ys[2] < ys[0]
    assert all(0 <= x <= 560 and 0 <= y <= 260 for x, y, *_ in points)


def test_one_point_and_a_flat_line_can_be_drawn_and_nothing_cannot():
    assert "<circle" in line_chart("x", [(5, 1.0)])
    assert "<path" in line_chart("x", [(0, 2.0), (5, 2.0)])
    with pytest.raises(ValueError, match="'x' has no finite point"):
        line_chart("x", [(0, math.nan)])
