"""A model small enough to train hundreds of steps in a test: a two-layer perceptron on rows [B, 4]."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.types import Mean, Source

NAMES = {
    "hidden": {"kernel": ("embed", "ffn"), "bias": ("ffn",)},
    "norm": {"scale": ("ffn",)},
    "out": {"kernel": ("ffn", None)},
}


@struct.dataclass
class Factored:
    """Stands for a Weight: a pytree node in the place of a matrix."""

    base: jax.Array
    a: jax.Array
    b: jax.Array

    def dense(self):
        return self.base + self.a @ self.b


def params(seed=0, width=8):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "hidden": {
            "kernel": jax.random.normal(keys[0], (4, width)) * 0.5,
            "bias": jnp.zeros(width),
        },
        "norm": {"scale": jnp.ones(width)},
        "out": {"kernel": jax.random.normal(keys[1], (width, 2)) * 0.5},
    }


def factored(seed=0):
    tree = params(seed)
    keys = jax.random.split(jax.random.key(seed + 1), 2)
    a, b = jax.random.normal(keys[0], (4, 2)), jax.random.normal(keys[1], (2, 8))
    tree["hidden"]["kernel"] = Factored(tree["hidden"]["kernel"], a, 0.1 * b)
    return tree


def predict(tree, x):
    kernel = tree["hidden"]["kernel"]
    kernel = kernel.dense() if isinstance(kernel, Factored) else kernel
    hidden = jnp.tanh(x @ kernel + tree["hidden"]["bias"][None, :])
    return (hidden * tree["norm"]["scale"][None, :]) @ tree["out"]["kernel"]


def objective(tree, context, batch, rng):
    """Weighted sum of squared errors, with noise from `rng` so that a wrong key shows."""
    noise = 0.01 * jax.random.normal(rng, batch["y"].shape)
    errors = jnp.square(predict(tree, batch["x"]) - batch["y"] - noise).sum(-1)
    return (errors * batch["weights"]).sum(), {"error": Mean.of(errors, batch["weights"])}


def rows(seed, index, batch=8):
    rng = np.random.default_rng((seed, index))
    x = rng.normal(size=(batch, 4)).astype(np.float32)
    y = np.stack([np.sin(x[:, 0]), x[:, 1] * x[:, 2]], -1).astype(np.float32)
    weights = np.full(batch, 1 / batch, np.float32)
    return {"x": x, "y": y, "weights": weights, "indices": index * batch + np.arange(batch)}


def source(batch=8, seen=None):
    """Rows by position; `seen` collects the indices that were handed out."""

    def next_batch(state, params, context, rng, last_metrics):
        made = rows(0, state["position"], batch)
        if seen is not None:
            seen.append(made["indices"].tolist())
        return made, {"position": state["position"] + 1}

    return Source(lambda rng: {"position": 0}, next_batch)


def buffered_source(size=4, batch=8):
    """Like a rollout buffer: targets come from the current parameters and are used for two steps,
    with noise from the given key and a coefficient driven by the last metrics."""

    def init(rng):
        empty = np.zeros((size * batch, 4), np.float32)
        return {"x": empty, "use": 0, "coefficient": 1.0, "key": jax.random.key_data(rng)}

    def next_batch(state, params, context, rng, last_metrics):
        state = dict(state)
        if state["use"] % size == 0:
            state["x"] = np.asarray(jax.random.normal(rng, (size * batch, 4)))
        x = state["x"][(state["use"] % size) * batch :][:batch]
        y = np.asarray(predict(params, x)) * 0.5 + state["coefficient"]
        if last_metrics:
            state["coefficient"] = 0.9 * state["coefficient"] + 0.01 * float(
                last_metrics["error"].value
            )
        state["use"] += 1
        return {"x": x, "y": y, "weights": np.full(batch, 1 / batch, np.float32)}, state

    return Source(init, next_batch)


def assert_bitwise(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
