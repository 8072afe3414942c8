"""GPTQ through a model: the Hessians are those of the model that comes out."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import built, logits, windows

from research.models import decoder
from research.models.families.llama import llama
from research.paths import RuleError, map_named
from research.quantize import calibrate, gptq, gptq_layers, measures
from research.quantize.rescale import leaf
from research.weights.base import merge
from research.weights.formats import Integer
from research.weights.quantized import Quantized, is_quantized, quantize

CONFIG = llama(50, 2, 16, 2, 1, 32, head_size=8)
RULE = r"stack_0/.*/kernel"
FORMAT = Integer(3, 8, "integer")
BLOCK = "stack_0/block_0"
NAMES = [f"{BLOCK}/attention/{n}/kernel" for n in "qkvo"]
NAMES += [f"{BLOCK}/ffn/{n}/kernel" for n in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def tiny():
    return built(CONFIG)


@pytest.fixture(scope="module")
def done(tiny):
    return gptq_layers.quantize(*tiny, windows(), RULE, FORMAT)


def solved(params, found, name, index):
    """The values [in, out] of one matrix on a Hessian from elsewhere."""
    one = {part: value[index] for part, value in found[name].items()}
    codes = gptq.quantize(leaf(params, name)[index].mT, 2 * one["sum"] / one["rows"], FORMAT)
    return np.asarray(FORMAT.values(*codes)).T


def same(found, expected):
    """Equal but for a number that lay between two codes."""
    return np.isclose(found, expected, atol=1e-4).mean() > 0.98


def test_hessians_are_those_of_the_model_that_comes_out(tiny, done):
    """Everything before a matrix is quantized when it is measured, so that in the finished model its
    inputs are the same; measured there in one pass, they give the same codes."""
    model, params = tiny
    found = calibrate.measure(model, done, windows(), RULE, measures.second, jnp.add)
    before = calibrate.measure(model, params, windows(), RULE, measures.second, jnp.add)
    for name in NAMES:
        assert isinstance(leaf(done, name), Quantized)
        for index in range(2):
            value = np.asarray(leaf(done, name).dense())[index]
            assert same(value, solved(params, found, name, index)), (name, index)
    last = f"{BLOCK}/ffn/down/kernel"
    assert not same(leaf(done, last).dense()[1], solved(params, before, last, 1))


def test_outputs_are_nearer_than_by_rounding_to_nearest(tiny):
    """What all tokens say lies close to four directions, so that columns can stand in for others."""
    model, params = tiny
    rng = np.random.default_rng(2)
    words, noise = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 16)), rng.normal(size=(50, 16))
    params = params | {"embed": {"table": jnp.asarray(2 * words + 0.1 * noise, jnp.float32)}}
    done = gptq_layers.quantize(model, params, windows(), RULE, FORMAT)
    exact, nearest = logits(model, params), quantize(params, RULE, FORMAT)
    error, naive = (np.square(logits(model, merge(p)) - exact).mean() for p in (done, nearest))
    assert error < 0.7 * naive


def test_a_layer_measured_at_once_sees_its_own_matrices_as_they_were(tiny):
    model, params = tiny
    found = calibrate.measure(model, params, windows(), RULE, measures.second, jnp.add)
    once = gptq_layers.quantize(model, params, windows(), RULE, FORMAT, stages=(".*",))
    for name in NAMES:
        assert same(leaf(once, name).dense()[0], solved(params, found, name, 0)), name


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_that_have_nothing_to_do_with_each_other_round_to_nearest(tiny, act_order):
    """Each token is a direction of its own and comes equally often: the first layer's norm gives
    inputs whose Hessian is the identity, times a number."""
    model, params = decoder.Decoder(llama(16, 1, 16, 2, 1, 32, head_size=8)), tiny[1]
    params = map_named(lambda name, w: w[:1] if name.startswith("stack") else w, params)
    own = params["stack_0"]["block_0"] | {"attention_norm": {"scale": jnp.ones((1, 16))}}
    table, head = {"table": jnp.eye(16)}, {"kernel": params["head"]["kernel"][:, :16]}
    params = params | {"embed": table, "stack_0": {"block_0": own}, "head": head}
    rng = np.random.default_rng(3)
    text = np.stack([rng.permutation(16) for _ in range(4)])
    found = gptq_layers.quantize(model, params, text, RULE, FORMAT, act_order=act_order)
    nearest = quantize(params, RULE, FORMAT)
    for name in NAMES[:3]:
        assert same(leaf(found, name).dense(), leaf(nearest, name).dense()), name
    assert not same(leaf(found, NAMES[-1]).dense(), leaf(nearest, NAMES[-1]).dense())


def test_layers_that_are_apart_are_quantized_alike(tiny, done):
    apart = gptq_layers.quantize(tiny[0], decoder.unstack(tiny[1]), windows(), RULE, FORMAT)
    assert isinstance(apart["stack_0"], tuple)
    jax.tree.map(np.testing.assert_array_equal, apart, decoder.unstack(done))


def test_only_what_the_rule_matches(tiny):
    met = []
    rule = rf"{BLOCK}/ffn/.*/kernel"
    done = gptq_layers.quantize(*tiny, windows(), rule, FORMAT, progress=met.append)
    assert [str(layer) for layer in met] == [f"{BLOCK}[0]", f"{BLOCK}[1]"]
    for name in NAMES:
        assert is_quantized(leaf(done, name)) == bool(re.fullmatch(rule, name))


def test_bad_input(tiny, done):
    def attempt(rule=RULE, format=FORMAT, text=None, params=tiny[1], **options):
        text = windows() if text is None else text
        gptq_layers.quantize(tiny[0], params, text, rule, format, **options)

    with pytest.raises(RuleError, match="matches none"):
        attempt(r"stack_0/.*/weight")
    with pytest.raises(ValueError, match=r"only matrices of layers, not \['head/kernel'\]"):
        attempt(r".*/kernel")
    with pytest.raises(ValueError, match=r"attention/k/kernel is in none of the stages"):
        attempt(stages=gptq_layers.STAGES[1:])
    with pytest.raises(
        ValueError, match=r"stands on matrices .* not .*attention_norm/scale \(16,\)"
    ):
        attempt(r".*/attention_norm/scale", stages=(".*",))
    with pytest.raises(ValueError, match=r"(k|o|q|v)/kernel is a Quantized already"):
        attempt(params=done)
    with pytest.raises(ValueError, match=r"kernel \(16, \d+\): groups of 12 do not fill 16"):
        attempt(format=Integer(3, 12))
    with pytest.raises(
        ValueError, match=r"down/kernel \(32, 16\) needs at least .* 32; windows \(2, 12\) have 24"
    ):
        attempt(text=windows()[:2])
    with pytest.raises(
        ValueError, match=r"q/kernel of stack_0/block_0\[0\]: .* not positive definite"
    ):
        attempt(text=np.zeros((6, 12), np.int32), rule=NAMES[0], damping=0)


def test_a_rare_and_small_input_is_kept_where_it_counts_more():
    """A sink: one direction at the first place of each window, a thousandth of the Hessian."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(32, 64, 16)) @ rng.normal(size=(16, 64)) + 0.3 * rng.normal(
        size=(32, 64, 64)
    )
    sink = 0.3 * rng.normal(size=64)
    x[:, 0] = sink
    w = jnp.asarray(rng.normal(size=(48, 64)), jnp.float32)

    def errors(first):
        found = measures.SecondOfWindows(64, first)(jnp.asarray(x.reshape(-1, 64)))
        codes = gptq.quantize(w, 2 * found["sum"] / found["rows"], Integer(4, 64, "integer"))
        moved = np.asarray(Integer(4, 64, "integer").values(*codes) - w)
        return [np.square(rows @ moved.T).mean() for rows in (sink[None], x[:, 1:].reshape(-1, 64))]

    (plain_sink, plain_rest), (sink_error, rest) = errors(1.0), errors(50.0)
    assert sink_error < 0.4 * plain_sink and rest < 1.3 * plain_rest
