"""Small models whose norms and biases are not those they begin with, and text for them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from research.models import decoder
from research.paths import map_named


def built(config):
    model, rng = decoder.Decoder(config), np.random.default_rng(0)

    def drawn(name, kind):
        normal = rng.normal(size=kind.shape).astype(np.float32)
        return jnp.asarray(0.3 * normal + name.endswith("scale"))

    kinds = jax.eval_shape(partial(decoder.init, model), jax.random.key(0))
    return model, map_named(drawn, kinds)


def windows():
    """[6, 12] of 50 tokens."""
    return np.random.default_rng(1).integers(0, 50, (6, 12)).astype(np.int32)


@partial(jax.jit, static_argnums=0)
def logits(model, params):
    return model.apply({"params": params}, windows())


def close(model, params, other):
    """The two are one function to 1e-5 of its largest logit."""
    before, after = (logits(model, p) for p in (params, other))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * np.abs(before).max())
