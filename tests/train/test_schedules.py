import math

import numpy as np
import pytest

from research.train.schedules import Constant, Cosine, InverseSquareRoot, Linear, WarmupStableDecay


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(2.0, warmup_steps=4), {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 900: 2.0}),
        (Constant(2.0), {0: 2.0}),
        (Linear(1.0, 12, 2, end=0.2), {0: 0.5, 1: 1.0, 2: 1.0, 7: 0.6, 11: 0.28, 12: 0.2, 99: 0.2}),
        (
            Cosine(1.0, 10, 2, end=0.1),
            {0: 0.5, 2: 1.0, 4: 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 6: 0.55, 10: 0.1},
        ),
        (InverseSquareRoot(3.0, 4), {0: 0.75, 3: 3.0, 8: 2.0, 15: 1.5, 35: 1.0}),
        (
            WarmupStableDecay(1.0, steps=20, decay_steps=10, warmup_steps=5),
            {0: 0.2, 4: 1.0, 9: 1.0, 10: 1.0, 15: 0.5, 19: 0.1, 20: 0.0},
        ),
    ],
)
def test_hand_numbers(schedule, expected):
    got = {step: float(schedule(np.int32(step))) for step in expected}
    assert got == pytest.approx(expected, rel=1e-6)


def test_the_rate_of_the_2017_transformer():
    rate = InverseSquareRoot.of_width(512, 4000)
    # 512^-0.5 = 0.0441942, and 4000^0.5 = 63.2456: t = 1, 4000, 16,000 and 100,000.
    expected = {0: 1.746928e-7, 3999: 6.987712e-4, 15_999: 3.493856e-4, 99_999: 1.397542e-4}
    assert {step: float(rate(step)) for step in expected} == pytest.approx(expected, rel=1e-6)
    for t in (1, 17, 3999, 4001, 9999):
        paper = 512**-0.5 * min(t**-0.5, t * 4000**-1.5)
        assert float(rate(t - 1)) == pytest.approx(paper, rel=1e-5)
    assert float(InverseSquareRoot.of_width(512, 4000, 2.0)(16)) == 2 * float(rate(16))


def test_the_first_step_is_never_dead():
    for schedule in (Constant(1.0, 100), Linear(1.0, 200, 100), Cosine(1.0, 200, 100)):
        assert float(schedule(0)) == pytest.approx(0.01)
    assert float(InverseSquareRoot(1.0, 100)(0)) == pytest.approx(0.01)


def test_no_room_for_the_warmup_is_an_error():
    with pytest.raises(ValueError, match="10 steps has no room for 10"):
        Cosine(1.0, steps=10, warmup_steps=10)
    with pytest.raises(ValueError, match="no room"):
        WarmupStableDecay(1.0, steps=10, decay_steps=6, warmup_steps=5)
