"""The benchmark of prompt lookup with calls that only pretend, and its summary by hand."""

import numpy as np
import pytest

from research.decode import Generation, Speculation
from scripts.bench_speculative import Measured, alternate, parse


def said(tokens):
    row = np.array([tokens], np.int32)
    return Speculation(Generation(row, np.array([len(tokens)]), np.zeros(row.shape)), 2, 8, 3)


def test_repetitions_alternate():
    calls = []
    plain = lambda: calls.append("plain") or [4, 5, 6]  # noqa: E731
    lookup = lambda: calls.append("lookup") or said([4, 5, 6])  # noqa: E731
    found = alternate(plain, lookup, 2)
    assert calls == ["plain", "lookup"] * 3
    assert len(found.plain) == len(found.lookup) == 2 and found.tokens == 3


def test_different_tokens_are_an_error():
    with pytest.raises(SystemExit, match="differ, first at new token 1"):
        alternate(lambda: [4, 5, 6], lambda: said([4, 7, 6]), 1)


def test_summary_by_hand():
    """Medians 2 s and 0.5 s for 3 tokens: 1.5 and 6 a second."""
    text = Measured([1.0, 2.0, 4.0], [0.5, 0.5, 1.0], 3, said([4, 5, 6])).summary()
    assert "plain 1.5 tokens/s, prompt lookup 6.0, ratio of medians 4.00" in text
    assert "of pairs 2.00 to 4.00" in text
    assert "2 forward passes for 3 tokens (1.50 each); 3 of 8 proposals accepted" in text


def test_options(capsys):
    assert (parse(["--quick"]).tokens, parse(["--quick"]).repeats) == (16, 1)
    with pytest.raises(SystemExit):
        parse(["--repeats", "0"])
    assert "must be at least 1" in capsys.readouterr().err
