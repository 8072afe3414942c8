"""The fused cross-entropy against the plain one, and the plain one against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from research.losses.lm import (
    cross_entropy,
    fused_cross_entropy,
    token_log_probs,
    token_log_probs_and_entropy,
)

B, T, D, V = 3, 11, 8, 50


def tied(params, h):
    return h @ params["embed"].T


@struct.dataclass
class Factored:
    """A matrix of which only two thin factors are trained, as LoRA is."""

    base: jax.Array
    a: jax.Array
    b: jax.Array


def factored(params, h):
    w = params["head"]
    return h @ w.base + (h @ w.a) @ w.b


@pytest.fixture
def batch(key):
    keys = jax.random.split(key, 4)
    hidden = jax.random.normal(keys[0], (B, T, D))
    params = {"embed": jax.random.normal(keys[1], (V, D))}
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    weights = jnp.where(jax.random.bernoulli(keys[3], 0.4, (B, T)), 0.03, 0).at[1].set(0)
    return params, hidden, targets, weights.at[2, 3].set(0.05)


def plain(project, params, hidden, targets, weights, **terms):
    return cross_entropy(project(params, hidden), targets, weights, **terms)


def close(a, b, tolerance=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_plain_against_numpy(batch):
    params, hidden, targets, weights = map(lambda x: jax.tree.map(np.asarray, x), batch)
    z = (hidden @ params["embed"].T).astype(np.float64)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    loss = nll = hits = count = 0.0
    smooth = 0.0
    for b in range(B):
        for t in range(T):
            own = -np.log(p[b, t, targets[b, t]])
            loss += weights[b, t] * own
            spread = 0.9 * own + 0.1 * np.mean(-np.log(p[b, t]))
            lse = np.log(np.exp(z[b, t]).sum())
            smooth += weights[b, t] * (spread + 0.01 * lse**2)
            if weights[b, t]:
                nll, count = nll + own, count + 1
                hits += z[b, t].argmax() == targets[b, t]
    value, metrics = plain(tied, *batch)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"].value, nll / count, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"].value, hits / count, rtol=1e-6)
    assert metrics["tokens"].total == count
    value, _ = plain(tied, *batch, label_smoothing=0.1, z_loss=0.01)
    np.testing.assert_allclose(value, smooth, rtol=1e-6)


BOTH = {"z_loss": 0.01, "label_smoothing": 0.1}


@pytest.mark.parametrize("chunk,terms", [(None, {}), (1, {}), (4, BOTH), (11, {}), (64, BOTH)])
def test_fused_equals_plain(batch, chunk, terms):
    params, hidden, targets, weights = batch

    def of(function, **more):
        def loss(p, h):
            return function(tied, p, h, targets, weights, **terms, **more)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, hidden)

    close(of(fused_cross_entropy, chunk=chunk), of(plain))


def test_value_without_gradient_and_outside_jit(batch):
    close(fused_cross_entropy(tied, *batch, chunk=4), plain(tied, *batch))


def test_gradient_is_scaled_by_the_cotangent(batch):
    params, hidden, targets, weights = batch

    def loss(f):
        return jax.grad(lambda p: 3 * f(tied, p, hidden, targets, weights)[0] ** 2)(params)

    close(loss(fused_cross_entropy), loss(plain), 1e-5)


def test_metrics_alone_have_zero_gradient(batch):
    params, *rest = batch
    grad = jax.grad(lambda p: fused_cross_entropy(tied, p, *rest)[1]["loss"].value)(params)
    assert not np.any(grad["embed"])


def test_no_weight_anywhere(batch):
    params, hidden, targets, weights = batch

    def loss(p, h):
        return fused_cross_entropy(tied, p, h, targets, weights * 0)

    (value, metrics), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, hidden)
    assert value == 0 and metrics["loss"].value == 0
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_positions_without_weight_may_hold_anything(batch):
    params, hidden, targets, weights = batch
    broken = jnp.where((weights == 0)[..., None], jnp.inf, hidden)

    def loss(h):
        return jax.value_and_grad(
            lambda p, h: fused_cross_entropy(tied, p, h, targets, weights, chunk=4)[0], (0, 1)
        )(params, h)

    value, gradients = loss(broken)
    clean, clean_gradients = loss(hidden)
    close(value, clean)
    jax.tree.map(close, gradients, clean_gradients)
    assert not np.any(np.where((weights == 0)[..., None], gradients[1], 0))


def test_bfloat16_gradients_accumulate_in_float32(batch):
    params, hidden, targets, weights = batch
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, hidden))

    def of(f, **more):
        return jax.grad(lambda p, h: f(tied, p, h, targets, weights, **more)[0], (0, 1))(*low)

    fused, exact = of(fused_cross_entropy, chunk=1), of(plain)
    assert fused[0]["embed"].dtype == jnp.bfloat16 and fused[1].dtype == jnp.bfloat16
    close(jax.tree.map(jnp.float32, fused), jax.tree.map(jnp.float32, exact), 2e-2)


def test_only_trained_leaves_inside_a_node_get_gradients(batch, key):
    _, hidden, targets, weights = batch
    base, a, b = (jax.random.normal(key, s) for s in [(D, V), (D, 2), (2, V)])

    def of(function):
        def loss(factors, h):
            node = Factored(base, factors["a"], factors["b"])
            return function(factored, {"head": node}, h, targets, weights)[0]

        return jax.grad(loss, (0, 1))

    arguments = ({"a": a, "b": b}, hidden)
    close(of(fused_cross_entropy)(*arguments), of(plain)(*arguments), 2e-6)
    # Nothing of the frozen matrix's shape is accumulated over the chunks.
    text = str(jax.make_jaxpr(of(fused_cross_entropy))(*arguments))
    assert f"f32[{D},{V}] = mul" not in text and f"f32[{D},{V}] = add_any" not in text
    whole = jax.grad(lambda w: fused_cross_entropy(
        factored, {"head": Factored(w, a, b)}, hidden, targets, weights)[0])  # fmt: skip
    assert f"f32[{D},{V}] = mul" in str(jax.make_jaxpr(whole)(base))


def test_integer_leaves_are_passed_through(batch):
    _params, hidden, targets, weights = batch
    codes = {"codes": jnp.arange(V, dtype=jnp.uint8), "scale": jnp.ones((D, V))}

    def project(p, h):
        return h @ (p["scale"] * p["codes"].astype(jnp.float32) / V)

    def loss(f):
        return jax.grad(lambda s: f(project, codes | {"scale": s}, hidden, targets, weights)[0])(
            codes["scale"]
        )

    close(loss(fused_cross_entropy), loss(plain))


def test_differentiating_the_weights_is_an_error(batch):
    params, hidden, targets, weights = batch
    with pytest.raises(ValueError, match="no gradient with respect to `weights`"):
        jax.grad(lambda w: fused_cross_entropy(tied, params, hidden, targets, w)[0])(weights)


def test_shapes_are_checked(batch):
    params, hidden, targets, weights = batch
    with pytest.raises(ValueError, match=r"expected hidden \[B, T, D\]"):
        fused_cross_entropy(tied, params, hidden[:, :-1], targets, weights)


def test_accumulated_in_a_scan_and_rematerialised(batch):
    params, hidden, targets, weights = batch

    def total(function):
        def step(p):
            @jax.checkpoint
            def body(carry, row):
                h, y, w = (x[None] for x in row)
                return carry + function(tied, p, h, y, w)[0], None

            return jax.lax.scan(body, 0.0, (hidden, targets, weights))[0]

        return jax.jit(jax.value_and_grad(step))(params)

    close(total(fused_cross_entropy), total(plain))


def test_the_head_runs_only_where_there_is_loss(batch):
    """Counted at run time: rows hold at most `longest` supervised positions, in chunks of 2."""
    params, hidden, targets, weights = batch
    calls = []

    def counting(params, h):
        jax.debug.callback(lambda: calls.append(1))
        return tied(params, h)

    jax.block_until_ready(fused_cross_entropy(counting, params, hidden, targets, weights, chunk=2))
    jax.effects_barrier()
    longest = int((weights != 0).sum(1).max())
    assert len(calls) == -(-longest // 2) < -(-T // 2)


def test_sharded_over_data(batch):
    params, hidden, targets, weights = batch
    whole = [jnp.tile(x, (8, *[1] * (x.ndim - 1)))[:8] for x in (hidden, targets, weights)]
    loss = jax.jit(jax.value_and_grad(
        lambda p, h, y, w: fused_cross_entropy(tied, p, h, y, w, chunk=2)[0], (0, 1)))  # fmt: skip
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(whole, NamedSharding(mesh, PartitionSpec("data")))
    close(loss(params, *spread), loss(params, *whole))


def test_token_log_probs(batch):
    params, hidden, targets, weights = batch

    def exact(p, h):
        logp = jax.nn.log_softmax(tied(p, h))
        return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]

    def chunked(p, h, w=None):
        return token_log_probs(tied, p, h, targets, w, chunk=4)

    close(chunked(params, hidden), exact(params, hidden))
    close(chunked(params, hidden, weights), jnp.where(weights != 0, exact(params, hidden), 0))
    grads = [
        jax.grad(lambda p, h, f=f: (f(p, h) * weights).sum(), (0, 1))(params, hidden)
        for f in (exact, chunked, lambda p, h: chunked(p, h, weights))
    ]
    close(grads[1], grads[0])
    close(grads[2], grads[0])


def memory(function, trained):
    """Temporary bytes of head, loss and gradient at the size of SmolLM2's head, B·T = 1024."""
    B, T, D, V = 4, 256, 576, 49152
    shape = jax.ShapeDtypeStruct

    def loss(p, h, y, w):
        return function(tied, p, h, y, w)

    step = jax.value_and_grad(loss, (0, 1) if trained else 1, has_aux=True)
    table, hidden = {"embed": shape((V, D), jnp.float32)}, shape((B, T, D), jnp.float32)
    targets, weights = shape((B, T), jnp.int32), shape((B, T), jnp.float32)
    compiled = jax.jit(step).lower(table, hidden, targets, weights).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("trained,times", [(True, 2.5), (False, 10)])
def test_memory_of_head_and_loss(trained, times):
    assert memory(plain, trained) >= times * memory(fused_cross_entropy, trained)


def test_entropy_at_each_position(batch):
    params, hidden, targets, weights = batch
    own, entropy = token_log_probs_and_entropy(tied, params, hidden, targets, weights, chunk=4)
    log_p = jax.nn.log_softmax(tied(params, hidden))
    wanted = jnp.where(weights != 0, -(jnp.exp(log_p) * log_p).sum(-1), 0)
    close(entropy, wanted, 1e-5)
    close(own, token_log_probs(tied, params, hidden, targets, weights), 1e-6)
