"""The GPT family: published sizes, config.json in both directions, and the banded pattern."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn

from research.models import decoder
from research.models.additive import Learned
from research.models.families import ConfigError, gpt, read
from research.models.position import Rope

PUBLISHED = {
    "gpt-1": 116_534_784,
    "gpt-2": 124_439_808,
    "gpt-2-medium": 354_823_168,
    "gpt-2-large": 774_030_080,
    "gpt-2-xl": 1_557_611_200,
}
# Of GPT-3 only the names were published ('1.3B'); these follow from the printed sizes.
DERIVED = {
    "gpt-3-125m": (12, 768, 12, 64, 125e6),
    "gpt-3-350m": (24, 1024, 16, 64, 350e6),
    "gpt-3-760m": (24, 1536, 16, 96, 760e6),
    "gpt-3-1.3b": (24, 2048, 24, 128, 1.52e9),  # 24 heads of 128 are more than the width
    "gpt-3-2.7b": (32, 2560, 32, 80, 2.7e9),
    "gpt-3-6.7b": (32, 4096, 32, 128, 6.7e9),
    "gpt-3-13b": (40, 5140, 40, 128, 13e9),
    "gpt-3-175b": (96, 12_288, 96, 128, 175e9),
}


def count(name):
    return decoder.count_parameters(decoder.Decoder(gpt.PRESETS[name]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    assert count(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", DERIVED)
def test_gpt3_counts_follow_from_the_printed_sizes(name):
    L, D, N, H, about = DERIVED[name]
    attention = 3 * (D * N * H + N * H) + N * H * D + D
    feed_forward = 2 * D * 4 * D + 4 * D + D
    by_hand = (50_257 + 2048) * D + L * (attention + feed_forward + 4 * D) + 2 * D
    assert count(name) == by_hand
    assert by_hand == pytest.approx(about, rel=0.02)


def test_every_preset_is_counted():
    assert {*PUBLISHED, *DERIVED} == set(gpt.PRESETS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_round_trip(name):
    config = gpt.to_huggingface(gpt.PRESETS[name])
    assert read(config)[1] == gpt.PRESETS[name]


def test_gpt2_begins_with_small_residual_projections(key):
    """The std of each kernel of four layers: 0.02, and 0.02 / sqrt(8) where the residual adds."""
    config = gpt.gpt(50, 4, 64, 4, 16)
    block = decoder.init(decoder.Decoder(config), key)["stack_0"]["block_0"]
    for part, name, scale in (
        ("attention", "q", 1),
        ("attention", "v", 1),
        ("ffn", "up", 1),
        ("attention", "o", 8**-0.5),
        ("ffn", "down", 8**-0.5),
    ):
        layers = block[part][name]["kernel"]
        assert np.std(layers) == pytest.approx(0.02 * scale, rel=0.02), name
        assert len({float(layer.sum()) for layer in layers}) == 4
        assert not block[part][name]["bias"].any()


BASE = gpt.to_huggingface(gpt.PRESETS["gpt-2"])
FIRST = gpt.to_huggingface(gpt.PRESETS["gpt-1"])


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (BASE, {"activation_function": "gelu"}, "activation_function = 'gelu' is not implemented"),
        (BASE, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        (BASE, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = True"),
        (BASE, {"scale_attn_weights": False}, "scale_attn_weights = False"),
        (BASE, {"add_cross_attention": True}, "add_cross_attention = True"),
        (FIRST, {"afn": "silu"}, "afn = 'silu' is not implemented, only 'gelu'"),
        (BASE, {"n_head": 5}, "n_head = 5 does not divide n_embd = 768"),
    ],
)
def test_what_would_change_the_result_is_refused(base, change, message):
    with pytest.raises(ConfigError, match=message):
        gpt.from_huggingface({**base, **change})


def test_missing_field_is_named():
    with pytest.raises(ConfigError, match="lacks the field 'n_positions'"):
        gpt.from_huggingface({k: v for k, v in BASE.items() if k != "n_positions"})


SMALL = gpt.gpt(50, 4, 24, 3, 32)


@pytest.mark.parametrize(
    "ablated",
    [
        dataclasses.replace(SMALL, position=Rope()),
        gpt.gpt(50, 4, 24, 3, 32, windows=[4] * 4),
        gpt.gpt(50, 4, 24, 3, 32, head_size=4),
        dataclasses.replace(SMALL, final_norm=None),
        gpt.gpt3(4, 24, 3, 8),
    ],
)
def test_an_ablation_is_not_saved_as_what_it_is_not(ablated):
    with pytest.raises(ConfigError, match=r"LMHeadModel has no (stacks|position)"):
        gpt.to_huggingface(ablated)


def test_how_positions_began_is_no_hindrance_to_saving():
    other = dataclasses.replace(SMALL, position=Learned(32, init_std=0.01))
    assert gpt.to_huggingface(other) == gpt.to_huggingface(SMALL)


def forward(config, params, tokens):
    return decoder.Decoder(config).apply({"params": params}, tokens)


def test_the_banded_pattern_equals_a_dense_mask(key):
    """Layer by layer with attention written out under a T×T mask: even layers dense, odd banded."""
    config = gpt.gpt3(4, 24, 3, 16, band=3, max_length=32, vocab_size=50)
    (stack,) = config.stacks
    assert (stack.count, len(stack.pattern)) == (2, 2)
    params = decoder.init(decoder.Decoder(config), key)
    params = jax.tree.map(lambda w: w * 8 if w.ndim == 3 else w, params)
    tokens = jax.random.randint(key, (2, 9), 0, 50)
    x = params["embed"]["table"][tokens] + params["position"]["table"][:9]
    gap = np.arange(9)[:, None] - np.arange(9)[None]
    for number in range(4):
        visible = (gap >= 0) & (gap < 3) if number % 2 else gap >= 0
        layer = jax.tree.map(lambda a: a[number // 2], params["stack_0"][f"block_{number % 2}"])  # noqa: B023
        x = written_out(layer, x, visible)
    want = norm(params["final_norm"], x) @ params["embed"]["table"].T
    np.testing.assert_allclose(forward(config, params, tokens), want, atol=1e-4)
    dense = gpt.gpt3(4, 24, 3, 16, band=32, max_length=32, vocab_size=50)
    assert np.abs(forward(dense, params, tokens) - want)[:, :3].max() < 1e-4
    assert np.abs(forward(dense, params, tokens) - want)[:, 3:].max() > 1e-2


def norm(params, x):
    y = x - x.mean(-1, keepdims=True)
    return y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def written_out(layer, x, visible):
    attention, ffn = layer["attention"], layer["ffn"]
    y = norm(layer["attention_norm"], x)
    q, k, v = (linear(attention[name], y).reshape(*y.shape[:2], 3, 16) for name in "qkv")
    scores = np.where(visible, np.einsum("btnh,bsnh->bnts", q, k) / 4, -np.inf)
    mixed = np.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)
    x = x + linear(attention["o"], mixed.reshape(*y.shape[:2], -1))
    return x + linear(ffn["down"], nn.gelu(linear(ffn["up"], norm(layer["ffn_norm"], x))))


def test_a_window_for_each_layer_or_none_at_all():
    with pytest.raises(ValueError, match="expected one window for each of 4 layers"):
        gpt.gpt(50, 4, 24, 3, 32, windows=[None, 8])
