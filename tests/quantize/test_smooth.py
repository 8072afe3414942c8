"""SmoothQuant: a function that stays, factors written down again in numpy, and the error they leave."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import built, close, windows

from research.adapters import bottleneck
from research.models import decoder, seq2seq
from research.models.block import post_norm
from research.models.families.chatglm import chatglm
from research.models.families.gpt import gpt
from research.models.families.llama import llama
from research.models.families.qwen import qwen
from research.models.families.transformer import transformer
from research.models.layers import Mlp
from research.quantize import calibrate, measures
from research.quantize.rescale import NORM_INPUTS, inject_outliers, leaf, norm_pairs
from research.quantize.smooth import errors, search, smooth
from research.weights import lora
from research.weights.formats import Integer

FAMILIES = {
    "llama": llama(50, 2, 24, 6, 2, 32, head_size=4),
    "gpt": gpt(50, 2, 24, 4, 32),
    "qwen": qwen(50, 2, 24, 6, 2, 32, windows=[None, 8]),
}
ATTENTION, FFN = "stack_0/block_0/attention_norm", "stack_0/block_0/ffn_norm"


def measured(model, params, measure=measures.absmax, combine=jnp.maximum):
    return calibrate.measure(model, params, windows(), NORM_INPUTS, measure, combine)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays_and_what_is_written_changes(family):
    model, params = built(FAMILIES[family])
    done = smooth(model, params, measured(model, params), 0.6)
    close(model, params, done)
    for pair in norm_pairs(model, params):
        for name in (*pair.written, *pair.readers):
            assert np.abs(leaf(done, name) / leaf(params, name) - 1).max() > 0.1, name
    names = {
        pair.source: (len(pair.written), len(pair.readers)) for pair in norm_pairs(model, params)
    }
    assert names[ATTENTION] == (2 if family == "gpt" else 1, 3)
    assert names[FFN] == ((2, 1) if family == "gpt" else (1, 2))


def test_factors_are_the_papers_with_an_alpha_for_each_layer():
    model, params = built(FAMILIES["llama"])
    absmax = measured(model, params)
    alpha = {ATTENTION: jnp.array([0.2, 0.9]), FFN: 0.5}
    done = smooth(model, params, absmax, alpha)
    attention = params["stack_0"]["block_0"]["attention"]
    for layer, own in enumerate((0.2, 0.9)):
        w = np.concatenate([np.asarray(attention[n]["kernel"][layer]) for n in "qkv"], axis=1)
        x = np.asarray(absmax["stack_0/block_0/attention/q/kernel"][layer])
        s = x**own / np.abs(w).max(axis=1) ** (1 - own)
        found = leaf(params, f"{ATTENTION}/scale")[layer] / leaf(done, f"{ATTENTION}/scale")[layer]
        np.testing.assert_allclose(found, s, rtol=1e-4)
    # At alpha 1/2 inputs and matrix have the same largest number in every channel.
    after = measured(model, done)["stack_0/block_0/ffn/up/kernel"]
    ffn = done["stack_0"]["block_0"]["ffn"]
    largest = np.maximum(*(np.abs(ffn[n]["kernel"]).max(-1) for n in ("gate", "up")))
    np.testing.assert_allclose(after, largest, rtol=1e-4)


def test_channels_that_are_never_read_or_written_stay_finite():
    model, params = built(FAMILIES["llama"])
    scale = params["stack_0"]["block_0"]["ffn_norm"]["scale"]
    params["stack_0"]["block_0"]["ffn_norm"]["scale"] = scale.at[:, 3].set(0)
    for name in ("gate", "up"):
        kernel = params["stack_0"]["block_0"]["ffn"][name]["kernel"]
        params["stack_0"]["block_0"]["ffn"][name]["kernel"] = kernel.at[:, 5].set(0)
    for alpha in (0.0, 0.5, 1.0):
        close(model, params, smooth(model, params, measured(model, params), alpha))


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_outliers_that_change_no_function_are_undone_by_smoothing(family):
    model, params = built(FAMILIES[family])
    broken = inject_outliers(model, params, [2, 11], 100.0)
    close(model, params, broken)
    before, after = measured(model, params), measured(model, broken)
    for name, x in before.items():
        np.testing.assert_allclose(after[name][:, [2, 11]], 100 * x[:, [2, 11]], rtol=1e-3)
    samples = measured(model, broken, measures.Sample(40), measures.join)
    assert samples["stack_0/block_0/ffn/up/kernel"].shape == (2, 80, 24)
    naive = errors(model, broken, after, samples, None)
    grid = (0.0, 0.3, 0.5, 0.7, 1.0)
    chosen = search(model, broken, after, samples, grid)
    best = errors(model, broken, after, samples, chosen)
    for norm, alpha in chosen.items():
        assert alpha.shape == (2,) and set(alpha.tolist()) <= set(np.float32(grid).tolist())
        assert (best[norm] < 0.02 * naive[norm]).all()
    for other in grid:
        found = errors(model, broken, after, samples, other)
        assert all((best[norm] <= found[norm] * 1.0001).all() for norm in chosen)
    found = smooth(model, broken, after, chosen)
    close(model, broken, found)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
        found,
        smooth(model, params, before, chosen),
    )


def test_the_error_is_that_of_rounded_products_written_down_again():
    model, params = built(FAMILIES["llama"])
    samples = measured(model, params, measures.Sample(30), measures.join)
    found = errors(model, params, measured(model, params), samples, 0.3, Integer(4, "row"))
    done = smooth(model, params, measured(model, params), 0.3)
    s = np.asarray(leaf(params, f"{FFN}/scale") / leaf(done, f"{FFN}/scale"), np.float64)

    def nearest(x, axis):
        step = np.abs(x).max(axis=axis, keepdims=True) / 7
        return np.round(x / step) * step

    for layer in range(2):
        x = np.asarray(samples["stack_0/block_0/ffn/up/kernel"][layer], np.float64)
        error = size = 0
        for name in ("gate", "up"):
            w = np.asarray(params["stack_0"]["block_0"]["ffn"][name]["kernel"][layer], np.float64)
            y = nearest(x / s[layer], 1) @ nearest(w * s[layer][:, None], 0)
            error, size = error + np.square(y - x @ w).sum(), size + np.square(x @ w).sum()
        np.testing.assert_allclose(found[FFN][layer], error / size, rtol=1e-2)


def test_where_something_else_reads_the_norm_it_is_refused():
    def refuses(model, params, match):
        with pytest.raises(ValueError, match=match):
            norm_pairs(model, params)

    at = "stack_0/block_0"
    model = decoder.Decoder(gpt(50, 2, 24, 4, 32, residual=post_norm))
    refuses(model, {}, f"{at}/attention_norm.*post_norm")
    model = decoder.Decoder(chatglm(50, 2, 24, 2, Mlp(32)))
    refuses(model, {}, f"{at}/attention_norm.*NormedResidual")
    model, params = built(FAMILIES["llama"])
    adapted = bottleneck.parallel(model, params, jax.random.key(0), size=4)
    refuses(*adapted, f"{at}/(attention|ffn) is a Parallel")
    adapted = lora.add(params, f"{at}/attention/k/kernel", jax.random.key(0), rank=2)
    refuses(model, adapted, f"{at}/attention/k/kernel is a LoRA already")
    both = seq2seq.Seq2Seq(transformer(50, 1, 24, 2, 32))
    refuses(both, {}, "decoders, not Seq2Seq")
    del params["stack_0"]["block_0"]["attention"]["v"]
    refuses(model, params, f"no {at}/attention/v/kernel")


def test_bad_input():
    model, params = built(FAMILIES["llama"])
    absmax = measured(model, params)
    with pytest.raises(ValueError, match=r"say nothing of the inputs of .*attention/q/kernel"):
        smooth(model, params, {})
    wrong = {name: x[:1] for name, x in absmax.items()}
    with pytest.raises(ValueError, match=r"q/kernel is \(1, 24\), not \(2, 24\)"):
        smooth(model, params, wrong)
    for alpha in (1.5, jnp.ones(3), jnp.nan):
        with pytest.raises(ValueError, match=r"alpha of .*attention_norm is a number from 0 to 1"):
            smooth(model, params, absmax, alpha)
    with pytest.raises(ValueError, match=r"alpha is for .*ffn_norm"):
        smooth(model, params, absmax, {ATTENTION: 0.5})
    with pytest.raises(ValueError, match="channels below 24"):
        inject_outliers(model, params, [24], 10.0)
    with pytest.raises(ValueError, match="factor other than 0"):
        inject_outliers(model, params, [2], 0.0)
    with pytest.raises(ValueError, match="group is 'row'"):
        errors(model, params, absmax, {}, 0.5, Integer(8, 8))
    with pytest.raises(ValueError, match=r"samples of .* are"):
        errors(model, params, absmax, absmax, 0.5)
    with pytest.raises(ValueError, match="grid is empty"):
        search(model, params, absmax, {}, [])
