"""Adapters against a decoder written out in NumPy, and what every insertion must leave alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import hub
from research.adapters import bottleneck
from research.decode import generate
from research.decode.sampling import Sampling
from research.models import decoder
from research.models.convert_heads import group_heads
from research.models.families.llama import llama
from research.models.position import NoPosition
from research.objectives import next_token
from research.paths import map_named, named_leaves
from research.train.partition import combine, partition
from research.weights import lora, merge

MODEL = decoder.Decoder(llama(40, 3, 16, 4, 2, 24, tied=True, init_std=0.3))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 10)), jnp.int32)
METHODS = {
    "houlsby": bottleneck.houlsby,
    "pfeiffer": bottleneck.pfeiffer,
    "parallel": bottleneck.parallel,
}
every_method = pytest.mark.parametrize("method", METHODS)


def logits(model, params, tokens=TOKENS):
    return model.apply({"params": params}, tokens)


def filled(params, key):
    """Every adapter's leaf at random, so that the adapter matters."""

    def of(path, leaf):
        return 0.4 * jax.random.normal(key, leaf.shape) if "/adapter/" in path else leaf

    return map_named(of, params)


@pytest.fixture
def params(key):
    return decoder.init(MODEL, key)


def rms_norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def relu(x):
    return np.maximum(x, 0)


def adapted(x, p, activation):
    inner = activation(x @ p["down"]["kernel"] + p["down"]["bias"])
    return inner @ p["up"]["kernel"] + p["up"]["bias"]


def attention(x, p, heads=4, kv_heads=2):
    """[T, D], head by head and query by query."""
    q, k, v = (x @ p[n]["kernel"] for n in "qkv")
    size = q.shape[1] // heads
    out = np.zeros_like(q)
    for head in range(heads):
        group = head // (heads // kv_heads)
        own, other = (slice(i * size, (i + 1) * size) for i in (head, group))
        for t in range(len(x)):
            weights = softmax(k[: t + 1, other] @ q[t, own] / np.sqrt(size))
            out[t, own] = weights @ v[: t + 1, other]
    return out @ p["o"]["kernel"]


def slow_logits(params, ids, method):
    """Layer after layer in float64, the adapters where each paper puts them."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    activation = silu if method == "houlsby" else relu
    x = params["embed"]["table"][ids]
    for number in range(3):
        p = jax.tree.map(lambda a, n=number: a[n], params["stack_0"]["block_0"])
        y = attention(rms_norm(x, p["attention_norm"]["scale"]), p["attention"])
        if method == "houlsby":
            y = y + adapted(y, p["attention"]["adapter"], activation)
        x = x + y
        normed, ffn = rms_norm(x, p["ffn_norm"]["scale"]), p["ffn"]
        y = silu(normed @ ffn["gate"]["kernel"]) * (normed @ ffn["up"]["kernel"])
        y = y @ ffn["down"]["kernel"]
        if method == "parallel":
            y = y + 4 * adapted(normed, ffn["adapter"], activation)
        else:
            y = y + adapted(y, ffn["adapter"], activation)
        x = x + y
    return rms_norm(x, params["final_norm"]["scale"]) @ params["embed"]["table"].T


@every_method
def test_against_the_decoder_written_out(method, params, key):
    model = decoder.Decoder(dataclasses.replace(MODEL.config, position=NoPosition()))
    model, tuned = METHODS[method](model, params, key, size=5)
    tuned = filled(tuned, key)
    found = logits(model, tuned)
    for row, ids in enumerate(np.asarray(TOKENS)):
        np.testing.assert_allclose(found[row], slow_logits(tuned, ids, method), atol=2e-4)
    base = dataclasses.replace(MODEL.config, position=NoPosition())
    assert np.abs(found - logits(decoder.Decoder(base), params)).max() > 0.1


@every_method
def test_with_a_zero_up_projection_it_is_the_base_model(method, params, key):
    model, tuned = METHODS[method](MODEL, params, key, size=5)
    zero = map_named(lambda n, w: 0 * w if "/adapter/up/" in n else w, tuned)
    np.testing.assert_allclose(logits(model, zero), logits(MODEL, params), atol=1e-6)


def test_they_begin_near_the_identity(params, key):
    base = logits(MODEL, params)
    for method in ("houlsby", "pfeiffer"):
        model, tuned = METHODS[method](MODEL, params, key, size=5)
        moved = np.abs(logits(model, tuned) - base).max()
        assert 0 < moved < 1e-2, method
    model, tuned = bottleneck.parallel(MODEL, params, key, size=5)
    np.testing.assert_array_equal(logits(model, tuned), base)


@every_method
def test_parameters_are_2md_and_m_and_d_for_each_adapter(method, params, key):
    D, R, L = 16, 5, 3
    model, tuned = METHODS[method](MODEL, params, key, size=R)
    added = sum(w.size for n, w in named_leaves(tuned) if "/adapter/" in n)
    assert added == L * (2 * R * D + D + R) * (2 if method == "houlsby" else 1)
    assert decoder.count_parameters(model) == decoder.count_parameters(MODEL) + added
    shapes = jax.tree.map(jnp.shape, decoder.init(model, key))
    assert shapes == jax.tree.map(jnp.shape, tuned)


def test_layers_and_sublayers_begin_differently(params, key):
    _, tuned = bottleneck.houlsby(MODEL, params, key, size=5)
    block = tuned["stack_0"]["block_0"]
    kernels = [block[n]["adapter"]["down"]["kernel"] for n in ("attention", "ffn")]
    layers = np.concatenate([np.asarray(k) for k in kernels]).reshape(6, -1)
    assert len(np.unique(layers[:, 0])) == 6
    assert np.abs(layers).max() <= 0.02 / 0.87  # cut off at two standard deviations of the normal


@every_method
def test_scan_loop_apart_and_remat_are_one_function(method, params, key):
    model, tuned = METHODS[method](MODEL, params, key, size=5)
    tuned = filled(tuned, key)
    want = logits(model, tuned)
    for change in ({"scan": False}, {"remat": "full"}):
        other = decoder.Decoder(dataclasses.replace(model.config, **change))
        np.testing.assert_allclose(logits(other, tuned), want, atol=1e-5)
    np.testing.assert_allclose(logits(model, decoder.unstack(tuned)), want, atol=1e-5)


@every_method
def test_greedy_decoding_with_a_cache_follows_the_whole_forward_pass(method, params, key):
    model, tuned = METHODS[method](MODEL, params, key, size=5)
    tuned = filled(tuned, key)
    prompts = [[1, 2, 3], [7, 8, 9, 10, 11]]
    found = generate(model, tuned, prompts, key, Sampling(max_tokens=5, temperature=0)).rows()
    for prompt, answer in zip(prompts, found, strict=True):
        ids = list(prompt)
        for token in answer:
            assert token == int(logits(model, tuned, jnp.asarray([ids]))[0, -1].argmax())
            ids.append(token)


@every_method
def test_training_moves_the_adapters_alone(method, params, key):
    model, tuned = METHODS[method](MODEL, params, key, size=5)
    trainable, frozen = partition(tuned, bottleneck.TRAINABLE)
    batch = {"tokens": TOKENS, "targets": TOKENS[:, ::-1], "weights": jnp.full((2, 10), 1 / 20)}
    objective, optimizer = next_token(model), optax.adam(1e-2)
    state, losses = optimizer.init(trainable), []

    @jax.jit
    def step(trainable, state):
        loss, grads = jax.value_and_grad(
            lambda t: objective(combine(t, frozen), None, batch, None)[0]
        )(trainable)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(trainable, updates), state, loss

    for _ in range(30):
        trainable, state, loss = step(trainable, state)
        losses.append(loss)
    assert losses[-1] < losses[0] - 0.3
    base, bare = bottleneck.remove(model, combine(trainable, frozen))
    assert base == MODEL
    jax.tree.map(np.testing.assert_array_equal, bare, params)


def test_the_rule_with_norms_adds_the_norms(params, key):
    _, tuned = bottleneck.pfeiffer(MODEL, params, key, size=5)
    trainable, _ = partition(tuned, bottleneck.WITH_NORMS)
    names = {name.rpartition("/")[0] for name, _ in named_leaves(trainable)}
    block = "stack_0/block_0"
    assert names == {
        *(f"{block}/ffn/adapter/{part}" for part in ("down", "up")),
        *(f"{block}/{norm}" for norm in ("attention_norm", "ffn_norm")),
        "final_norm",
    }


def test_remove_also_where_layers_are_apart(params, key):
    model, tuned = bottleneck.houlsby(MODEL, params, key)
    _, bare = bottleneck.remove(model, decoder.unstack(tuned))
    jax.tree.map(np.testing.assert_array_equal, bare, decoder.unstack(params))


def test_beside_attention_too(params, key):
    model, tuned = bottleneck.parallel(MODEL, params, key, 5, scale=2.0, at=("attention", "ffn"))
    np.testing.assert_array_equal(logits(model, tuned), logits(MODEL, params))
    tuned = filled(tuned, key)
    cache = decoder.empty_cache(model, 2, 10)
    found, _ = model.apply({"params": tuned}, TOKENS, cache=cache)
    np.testing.assert_allclose(found, logits(model, tuned), atol=1e-5)


def test_lora_stands_on_an_adapters_matrix_as_on_any_other(params, key):
    model, tuned = bottleneck.pfeiffer(MODEL, params, key, size=5)
    both = lora.add(tuned, r".*/adapter/down/kernel", key, rank=2)
    np.testing.assert_allclose(logits(model, merge(both)), logits(model, both), atol=1e-6)


def test_axes_name_every_leaf(params, key):
    model, tuned = bottleneck.houlsby(MODEL, params, key)
    axes = decoder.axes(model)
    ranks = jax.tree.map(jnp.ndim, tuned)
    assert ranks == jax.tree.map(len, axes, is_leaf=lambda names: isinstance(names, tuple))
    adapter = axes["stack_0"]["block_0"]["attention"]["adapter"]
    assert adapter["down"]["kernel"] == ("layers", "embed", "rank")
    assert adapter["up"]["bias"] == ("layers", "embed")


def test_a_model_with_adapters_is_not_saved_without_them(tmp_path, key):
    loaded = hub.load("tests/hub/fixtures/tiny_llama/gqa")
    model, tuned = bottleneck.houlsby(loaded.model, loaded.params, key, size=2)
    changed = dataclasses.replace(loaded, model=model, params=tuned)
    with pytest.raises(hub.CheckpointError, match=r"no checkpoint name for .*/attention/adapter/"):
        hub.save(tmp_path / "model", changed)
    assert not (tmp_path / "model").exists()
    base, bare = bottleneck.remove(model, tuned)
    hub.save(tmp_path / "model", dataclasses.replace(loaded, model=base, params=bare))
    again = hub.load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def test_what_cannot_be_done_is_refused(params, key):
    with pytest.raises(ValueError, match="size of at least 1, not 0"):
        bottleneck.houlsby(MODEL, params, key, size=0)
    with pytest.raises(ValueError, match=r"at 'attention' or 'ffn', not at \('head',\)"):
        bottleneck.parallel(MODEL, params, key, at=("head",))
    with pytest.raises(ValueError, match="stack_0 is one tree per layer"):
        bottleneck.pfeiffer(MODEL, decoder.unstack(params), key)
    model, tuned = bottleneck.pfeiffer(MODEL, params, key)
    with pytest.raises(ValueError, match="has adapters already"):
        bottleneck.parallel(model, tuned, key)
    with pytest.raises(ValueError, match="cannot be grouped"):
        group_heads(bottleneck.houlsby(MODEL, params, key)[0].config, params, 1)
