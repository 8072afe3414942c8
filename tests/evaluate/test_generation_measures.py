"""Measures of generated text against numbers counted by hand, slow forms, and limits."""

from itertools import combinations

import numpy as np
import pytest

from research.evaluate.generation import (
    bleu,
    characters,
    chrf,
    common_subsequence,
    exact_match,
    normalised,
    rouge_l,
    rouge_n,
    words,
)

CAT, DOG = "The cat sat on the mat.", "the cat was on a mat"


def test_exact_match_after_normalisation():
    assert normalised("  The Eiffel-Tower, in an  Hour! ") == "eiffeltower in hour"
    predictions = ["The cat.", "two cats", "4"]
    assert exact_match(predictions, [["a cat"], ["three cats"], ["four", "4."]]) == 2 / 3
    assert exact_match(["Cat"], [["cat"]], normalise=str.strip) == 0


def test_rouge_by_hand():
    """the cat sat on the mat | the cat was on a mat: both have the, cat, on, mat; the cat.

    1-grams: 4 of 6 and 6; 2-grams: `the cat` of 5 and 5; subsequence: the cat on mat, 4.
    """
    assert words(CAT) == ["the", "cat", "sat", "on", "the", "mat"]
    assert rouge_n([CAT], [[DOG]], 1) == pytest.approx(2 / 3)
    assert rouge_n([CAT], [[DOG]], 2) == pytest.approx(1 / 5)
    assert rouge_l([CAT], [[DOG]]) == pytest.approx(2 / 3)
    # Lin 2004, section 3: police killed the gunman / police kill the gunman / the gunman kill police
    said = ["police kill the gunman", "the gunman kill police"]
    assert rouge_l(said, [["police killed the gunman"]] * 2) == pytest.approx((3 / 4 + 2 / 4) / 2)
    # `the` counts as often as both have it: once of 3 and 2.
    assert rouge_n(["the the the"], [["the end"]], 1) == pytest.approx(2 / 5)


def test_rouge_limits():
    assert rouge_n([CAT], [[CAT]], 2) == rouge_l([CAT], [[CAT]]) == 1
    assert rouge_n([""], [[CAT]], 1) == rouge_l([CAT], [[""]]) == rouge_l([""], [[""]]) == 0
    assert rouge_l([CAT], [["nothing like it", DOG]]) == pytest.approx(2 / 3)
    assert rouge_l(["猫坐在席上"], [["猫在席上"]], characters) == pytest.approx(8 / 9)
    assert rouge_l(["猫坐在席上"], [["猫在席上"]]) == 0  # `words` sees no Chinese


def slow_common(a, b):
    for size in range(min(len(a), len(b)), 0, -1):
        if set(combinations(a, size)) & set(combinations(b, size)):
            return size
    return 0


def test_the_common_subsequence_equals_trying_all():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 8))) for _ in range(2))
        assert common_subsequence(a, b) == slow_common(a, b), (a, b)


def test_bleu_and_chrf():
    assert bleu([CAT], [[CAT]]) == pytest.approx(100)
    assert chrf([CAT], [[CAT]]) == pytest.approx(100)
    # a b c d e against a b c d f: precisions 4/5, 3/4, 2/3, 1/2, no brevity penalty.
    got = bleu(["a b c d e"], [["a b c d f"]])
    assert got == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # One word shorter than its reference: all precisions 1, the penalty exp(1 - 5/4).
    assert bleu(["a b c d"], [["a b c d e"]]) == pytest.approx(100 * np.exp(-1 / 4))
    # A second reference of one prediction alone.
    assert bleu([CAT, DOG], [["no", CAT], [DOG]]) == pytest.approx(100)
    assert bleu(["猫坐在席上。"], [["猫坐在席上。"]], tokenize="zh") == pytest.approx(100)
    # ab against ac, one-grams: P = R = 1/2; two-grams none: chrF averages orders that both have.
    assert chrf(["ab"], [["ac"]]) == pytest.approx(25)


def test_refusals():
    with pytest.raises(ValueError, match="2 predictions, references for 1"):
        rouge_l(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="0 predictions"):
        bleu([], [])
    with pytest.raises(ValueError, match=r"references of prediction 0.*'a'"):
        exact_match(["a"], ["a"])
