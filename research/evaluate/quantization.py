"""How far a quantized model is from the one it was made of.

    divergence      KL(p ‖ q) = Σ_v p_v (ln p_v − ln q_v) of the next token, p the full model's
                    distribution and q the quantized one's: nats a token, 0 when nothing changed
    relative error  ‖x' − x‖ / ‖x‖ in the Frobenius norm, of a matrix or of the states after a layer
    outliers        the largest of a matrix's input features over their median, each feature by its
                    largest magnitude (the statistic of `quantize.measures.absmax`): what decides
                    whether one scale can serve all features (Dettmers et al. 2022, arXiv:2208.07339)

Windows are [n, T] of token ids without padding, as `calibrate.windows_of` gives them; each of their
T − 1 predictions counts once.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.models.decoder import Decoder
from research.objectives import head_params, project_with
from research.paths import named_leaves, require_match
from research.types import Array, Params
from research.weights.base import dense, is_weight


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One number a window [n] float64, each a mean over the window's predictions.

    divergence  KL(full ‖ quantized), nats a token
    full, nll   nats a token of the text under the full and under the quantized model
    agreement   the share of predictions whose likeliest token is the same
    """

    divergence: np.ndarray
    full: np.ndarray
    nll: np.ndarray
    agreement: np.ndarray


def compare(
    model: Any,
    full: Params,
    quantized: Params,
    windows: np.ndarray,
    batch_size: int = 4,
    chunk: int = 64,
) -> Comparison:
    """Both parameters of `model` over windows [n, T].

    Logits exist for `chunk` positions of a batch at a time. ValueError without a window of two tokens.
    """
    require_windows(windows, 2)
    sums = over_batches(partial(_sums, model, chunk), full, quantized, windows, batch_size)
    return Comparison(*(np.asarray(sums, np.float64).T / (windows.shape[1] - 1)))


def standard_error(values: np.ndarray) -> float:
    """Of the mean of n ≥ 2 values: s / √n, s with n − 1 below."""
    if len(values) < 2:
        raise ValueError(f"a standard error needs two values or more, not {len(values)}")
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def require_windows(windows: np.ndarray, least: int) -> None:
    if np.ndim(windows) != 2 or not len(windows) or windows.shape[1] < least:
        raise ValueError(f"windows are [n, T], n > 0, T >= {least}; got {np.shape(windows)}")


def over_batches(
    function: Any, full: Params, quantized: Params, windows: np.ndarray, batch_size: int
) -> np.ndarray:
    """Rows of function(full, quantized, tokens [b, T]) -> [b, ...], one a window."""
    parts = [
        jax.device_get(function(full, quantized, jnp.asarray(windows[start : start + batch_size])))
        for start in range(0, len(windows), batch_size)
    ]
    return np.concatenate(parts)


@partial(jax.jit, static_argnums=(0, 1))
def _sums(model: Any, chunk: int, full: Params, quantized: Params, tokens: Array) -> Array:
    """[B, 4]: what Comparison has, summed over the predictions of each row."""
    B, T = tokens.shape[0], tokens.shape[1] - 1
    size = min(chunk, T)

    def cut(x: Array) -> Array:
        """[B, T, ...] -> [chunks, B, size, ...], filled up with zeros."""
        x = jnp.pad(x, [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

    def states(params: Params) -> Array:
        return cut(model.apply({"params": params}, tokens[:, :-1], method="hidden"))

    def score(part: tuple[Array, ...]) -> Array:
        before, after, targets, counted = part
        p, q = (
            jax.nn.log_softmax(project_with(model, head_params(params), hidden), axis=-1)
            for params, hidden in ((full, before), (quantized, after))
        )
        own = [-jnp.take_along_axis(x, targets[..., None], axis=-1)[..., 0] for x in (p, q)]
        same = (p.argmax(-1) == q.argmax(-1)).astype(jnp.float32)
        each = jnp.stack([(jnp.exp(p) * (p - q)).sum(-1), *own, same], axis=-1)
        return (each * counted[..., None]).sum(axis=1)

    parts = states(full), states(quantized), cut(tokens[:, 1:]), cut(jnp.ones((B, T)))
    return jax.lax.map(score, parts).sum(axis=0)


def matrix_errors(full: Params, quantized: Params, rule: str) -> dict[str, np.ndarray]:
    """{path: relative error [L] or []} of every matrix whose path `rule` matches whole.

    RuleError when the rule matches nothing; ValueError naming a path that only one side has.
    """
    before, after = (dict(named_leaves(p, is_leaf=is_weight)) for p in (full, quantized))
    apart = sorted(before.keys() ^ after.keys())
    if apart:
        raise ValueError(f"only one of the two models has {apart[0]}")
    names = require_match(rule, list(before))
    return {name: np.asarray(_error(before[name], after[name])) for name in names}


@jax.jit
def _error(before: Any, after: Any) -> Array:
    before, after = (dense(w).astype(jnp.float32) for w in (before, after))
    return relative_error(before, after, (-2, -1))


def relative_error(before: Array, after: Array, axis: Any) -> Array:
    """‖after − before‖ / ‖before‖ over `axis`."""
    return jnp.linalg.norm(after - before, axis=axis) / jnp.linalg.norm(before, axis=axis)


def state_errors(
    model: Decoder, full: Params, quantized: Params, windows: np.ndarray, batch_size: int = 4
) -> np.ndarray:
    """[L]: the relative error of the states after each layer, a mean over all windows' tokens.

    Layers in the order in which they run; errors of earlier layers go on in later ones.
    """
    require_windows(windows, 1)
    return over_batches(partial(_state_errors, model), full, quantized, windows, batch_size).mean(
        axis=(0, 2)
    )


@partial(jax.jit, static_argnums=0)
def _state_errors(model: Decoder, full: Params, quantized: Params, tokens: Array) -> Array:
    """[B, L, T]."""
    before, after = (layer_states(model, params, tokens) for params in (full, quantized))
    return jnp.moveaxis(relative_error(before, after, -1), 0, 1)


def layer_states(model: Decoder, params: Params, tokens: Array) -> Array:
    """The residual stream after each layer, [L, B, T, D], of tokens [B, T]; all exist at once."""
    found = []

    def recording(block: Any) -> Any:
        def residual(norm: Any, sublayer: Any, x: Array) -> Array:
            found.append(block.residual(norm, sublayer, x))
            return found[-1]

        return block.clone(residual=residual)

    stacks = tuple(
        dataclasses.replace(stack, pattern=tuple(map(recording, stack.pattern)))
        for stack in model.config.stacks
    )
    # A scan would trace the closure once for all layers, remat keep its tracers to itself.
    config = dataclasses.replace(model.config, stacks=stacks, scan=False, remat=None)
    type(model)(config).apply({"params": params}, tokens, method="hidden")
    return jnp.stack(found[1::2])  # a layer has two residual connections


def outliers(absmax: Array) -> np.ndarray:
    """Largest over median of the features' largest magnitudes [..., in] -> [...]."""
    absmax = np.asarray(absmax, np.float64)
    return absmax.max(axis=-1) / np.median(absmax, axis=-1)
