"""One optimizer step: exact gradient accumulation, update, moving average, all in one jit.

The batch carries weights that were divided by the counts of the whole step, so the objective
returns weighted sums and micro-batches only *add*: no mean is taken here, and a loss of several
terms with different denominators has exactly the gradient of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.paths import map_named, named_leaves
from research.train.average import SWA
from research.train.paged import choose
from research.train.partition import combine
from research.train.state import TrainState, micro_rng
from research.types import Array, Batch, Mean, Objective, Params, PyTree

Metrics = dict[str, Mean]
Step = Callable[[TrainState, Params, Any, Batch], tuple[TrainState, Metrics]]


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    ema_decay: float | None = None,
    mesh: Mesh | None = None,
    shardings: TrainState | None = None,
    swa: SWA | None = None,
) -> Step:
    """`step(state, frozen, context, batch) -> (state, metrics)`, jitted; `state` is donated except
    for its source state, which passes by untouched. `frozen` and `context` are never donated.

    Leaves of the batch are [accumulate * b, ...] and are split into `accumulate` micro-batches of
    consecutive rows; scalars go whole to each. ValueError when a leaf does not split.

    Metrics are the objective's, added over micro-batches, and objective (what is differentiated),
    grad_norm (before clipping), update_norm, param_norm, lr, and input_tokens (without padding)
    where the batch has `tokens`. `loss` is the objective's own metric of that name when it reports
    one, else the same as objective. When objective, grad_norm or update_norm is not finite, the
    state that comes back is the state that went in.

    An optimizer that accepts extra arguments receives value, grad, step, rng, frozen, context,
    batch. `shardings` (of the state, source state left out) pins where results live on `mesh`.
    The state's `ema` is moved by `ema_decay` or by `swa`.
    """
    update = optax.with_extra_args_support(optimizer).update

    def run(state: TrainState, frozen: Params, context: Any, batch: Batch):
        loss, metrics, grads = accumulated_gradients(
            objective, state, frozen, context, split_batch(batch, accumulate, mesh), accumulate
        )
        extra = dict(value=loss, grad=grads, step=state.step, rng=state.rng)
        extra |= dict(frozen=frozen, context=context, batch=batch)
        updates, opt_state = update(grads, state.opt_state, state.trainable, **extra)
        trainable = optax.apply_updates(state.trainable, updates)
        moved = state.replace(
            step=state.step + 1,
            trainable=trainable,
            opt_state=opt_state,
            ema=_moving_average(state.ema, trainable, ema_decay, swa, state.step + 1),
        )
        ours = _step_metrics(loss, grads, updates, trainable, opt_state, batch)
        finite = jnp.isfinite(loss)
        for name in ("grad_norm", "update_norm"):
            finite &= jnp.isfinite(ours[name].total)
        return _keep_if(finite, moved, state), _merge_metrics(metrics, ours)

    results = None if shardings is None else (shardings.replace(source_state=None), None)
    jitted = jax.jit(run, donate_argnums=0, out_shardings=results)

    def step(state: TrainState, frozen: Params, context: Any, batch: Batch):
        # Attention's kernels look for the mesh while they are traced (`kernels.sharded`).
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            moved, metrics = jitted(state.replace(source_state=None), frozen, context, batch)
        return moved.replace(source_state=state.source_state), metrics

    return step


def accumulated_gradients(
    objective: Objective,
    state: TrainState,
    frozen: Params,
    context: Any,
    micro_batches: Batch,
    accumulate: int,
) -> tuple[Array, Metrics, Params]:
    """(loss, metrics, float32 gradients) summed over micro-batches whose leaves are [A, b, ...]."""

    def one(index: Array, batch: Batch):
        def loss(trainable: Params):
            rng = micro_rng(state.rng, state.step, index)
            return objective(combine(trainable, frozen), context, batch, rng)

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable)
        grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
        return value.astype(jnp.float32), metrics, grads

    def add(total: PyTree, inputs: tuple[Array, Batch]):
        return jax.tree.map(jnp.add, total, one(*inputs)), None

    indices = jnp.arange(accumulate, dtype=jnp.int32)
    first = jax.tree.map(lambda leaf: leaf[0], (indices, micro_batches))
    if accumulate == 1:
        return one(*first)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, *first))
    return jax.lax.scan(add, zero, (indices, micro_batches))[0]


def split_batch(batch: Batch, accumulate: int, mesh: Mesh | None = None) -> Batch:
    """[A * b, ...] -> [A, b, ...]; rows of one micro-batch stay spread over the mesh."""

    def split(name: str, leaf: Array) -> Array:
        if jnp.ndim(leaf) == 0:
            return jnp.broadcast_to(leaf, (accumulate,))
        rows = leaf.shape[0]
        if rows % accumulate:
            raise ValueError(
                f"batch[{name!r}] has {rows} rows, which do not split into {accumulate} "
                "micro-batches; make the batch a multiple of `accumulate`"
            )
        leaf = jnp.reshape(leaf, (accumulate, rows // accumulate, *leaf.shape[1:]))
        if mesh is None:
            return leaf
        spread = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
        return jax.lax.with_sharding_constraint(leaf, spread)

    return map_named(split, batch)


def global_norm(tree: PyTree) -> Array:
    """Euclidean norm over all leaves, in float32."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros([], jnp.float32)))


def _step_metrics(loss, grads, updates, trainable, opt_state, batch) -> Metrics:
    values = {
        "objective": loss,
        "grad_norm": global_norm(grads),
        "update_norm": global_norm(updates),
        "param_norm": global_norm(trainable),
    }
    rate = optax.tree.get(opt_state, "learning_rate", None)
    if rate is not None:
        values["lr"] = rate
    tokens = _token_count(batch)
    if tokens is not None:
        values["input_tokens"] = tokens
    one = jnp.ones([], jnp.float32)
    return {name: Mean(jnp.asarray(value, jnp.float32), one) for name, value in values.items()}


def _token_count(batch: Batch) -> Array | int | None:
    """Tokens of the batch without padding; None when it is not made of tokens."""
    leaves = dict(named_leaves(batch))
    if "segment_ids" in leaves:
        return jnp.sum(leaves["segment_ids"] != 0)
    return leaves["tokens"].size if "tokens" in leaves else None


def _merge_metrics(objective: Metrics, ours: Metrics) -> Metrics:
    taken = sorted(set(objective) & set(ours))
    if taken:
        raise ValueError(
            f"the objective returns metrics named {taken}, which the step reports itself"
        )
    return {"loss": ours["objective"], **ours, **objective}


def _moving_average(
    ema: Params | None, trainable: Params, decay: float | None, swa: SWA | None, step: Array
) -> Params | None:
    if decay is None and swa is None:
        return ema
    if ema is None:
        raise ValueError(
            "ema_decay or swa is given but the state has no ema; start it with ema=True"
        )
    if swa is not None:
        share = swa.share(step)
        return jax.tree.map(
            lambda mean, leaf: mean + share * (leaf.astype(jnp.float32) - mean), ema, trainable
        )
    return jax.tree.map(
        lambda mean, leaf: decay * mean + (1.0 - decay) * leaf.astype(jnp.float32), ema, trainable
    )


def _keep_if(finite: Array, moved: TrainState, state: TrainState) -> TrainState:
    """`moved` where the step was finite, else `state`; the key never moves."""
    bare, before = moved.replace(rng=None), state.replace(rng=None)
    kept = jax.tree.map(lambda new, old: choose(finite, new, old), bare, before)
    return kept.replace(rng=state.rng)
