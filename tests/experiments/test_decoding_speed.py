"""The speed of decoding, by a clock made up here."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments.shared import decoding
from research.models import decoder
from research.models.families.llama import llama

CONFIG = llama(50, 1, 16, 2, 1, 24, max_length=32, tied=True)
DATA = SimpleNamespace(held_out=np.arange(40))


@pytest.mark.parametrize(("calls", "speed"), [(1, 8.0), (3, 4.0)])
def test_speed_is_the_median_after_the_call_that_compiles(monkeypatch, calls, speed):
    ticks = iter([0.0, 100.0, 100.0, 101.0, 101.0, 103.0, 103.0, 107.0])  # 100, 1, 2 and 4 s
    monkeypatch.setattr(decoding, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    model = decoder.Decoder(CONFIG)
    params = decoder.init(model, jax.random.key(0))
    assert decoding.decoding_speed(model, params, DATA, 12, 8, calls) == speed
