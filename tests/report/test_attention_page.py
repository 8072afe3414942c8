"""The attention page's data: weights as exact as it says, texts that cannot break it, its size."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from research.report import attention
from research.report.attention import pack, render_attention, unpack

EVIL = "</script><script>alert('x')</script><!-- title --><!-- data -->\"&"


def weights_of(L, N, T, seed=0):
    """Causal weights, some next to 0 and 1."""
    powers = np.exp(np.random.default_rng(seed).normal(size=(L, N, T, T)) * 4) * np.tri(T)
    return (powers / powers.sum(-1, keepdims=True)).astype(np.float32)


def rendered(weights, tokens=None, **change):
    L, N, T = weights.shape[:3]
    given = {
        "tokens": tokens or [f" {n}" for n in range(T)],
        "statistics": {"entropy": np.full((L, N), 0.5), "induction": np.full((L, N), np.nan)},
        "rollout": weights[:, 0],
        "title": "A title",
        **change,
    }
    return render_attention(weights, **given)


class Scripts(HTMLParser):
    """The texts of the script elements, as a browser tells where they end."""

    def __init__(self, text):
        super().__init__()
        self.found, self.inside, self.links = [], False, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        if tag == "script":
            self.inside = True
            self.found.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        if self.inside:
            self.found[-1] += data


def test_the_page_holds_every_weight_as_exactly_as_it_says():
    weights = weights_of(2, 3, 7)
    found = Scripts(rendered(weights)).found
    assert len(found) == 2
    data = json.loads(found[0])
    assert data["triangle"] and (data["layers"], data["heads"]) == (2, 3)
    assert len(data["codes"]) == 2 * 5 * 28 * 2 * 4 // 3 + 2  # 560 bytes, padded to threes
    maps = unpack(data, 2 * 5, 7).reshape(2, 5, 7, 7)
    np.testing.assert_allclose(maps[:, :3], weights, rtol=0, atol=1 / 131070 + 1e-7)
    np.testing.assert_allclose(maps[:, 3], weights.mean(1), rtol=0, atol=1e-5)
    np.testing.assert_allclose(maps[:, 4], weights[:, 0], rtol=0, atol=1e-5)
    assert data["statistics"] == {"entropy": [[0.5] * 3] * 2, "induction": [[None] * 3] * 2}


def test_what_lies_above_the_diagonal_is_kept_where_there_is_something():
    maps = weights_of(1, 2, 5)[0]
    maps[1] = maps[1].T
    packed = pack(maps)
    assert not packed["triangle"]
    np.testing.assert_allclose(unpack(packed, 2, 5), maps, rtol=0, atol=1e-5)


def test_thirty_layers_of_nine_heads_and_64_tokens_stay_below_three_megabytes():
    assert len(rendered(weights_of(30, 9, 64)).encode()) < 3e6


def test_no_text_breaks_the_page_and_it_refers_to_nothing():
    text = rendered(
        weights_of(1, 1, 3),
        tokens=[EVIL, "b", "起 1/3"],
        title=EVIL,
        facts=[EVIL],
        statistics={EVIL: [[0.0]]},
    )
    page = Scripts(text)
    assert len(page.found) == 2 and page.links == []
    assert json.loads(page.found[0])["tokens"] == [EVIL, "b", "起 1/3"]
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tokens": ["a"]}, "weights of 3 tokens need 3 labels, not 1"),
        ({"rollout": np.zeros((3, 3))}, r"rollout must be \(2, 3, 3\), not \(3, 3\)"),
        ({"statistics": {"x": np.zeros(2)}}, r"statistics\['x'\] must be \(2, 1\), not \(2,\)"),
        ({"rollout": np.full((2, 3, 3), 1.5)}, "must be in 0..1"),
        ({"rollout": np.full((2, 3, 3), np.nan)}, "must be in 0..1"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        rendered(weights_of(2, 1, 3), **change)


def test_maps_have_three_axes():
    with pytest.raises(ValueError, match=r"must be \[M, T, T\], not \(2, 2\)"):
        pack(np.zeros((2, 2)))


def test_every_statistic_is_explained():
    from research.evaluate.attention import statistics

    found = statistics(weights_of(1, 1, 3), np.arange(3))
    assert list(found) == list(attention.COLUMNS)
