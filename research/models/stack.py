"""A stack of layers: `count` times a short cycle of blocks, its parameters on a leading layer axis.

A stack is run by `lax.scan` over pure `block.apply`, so that compile time does not grow with depth,
or by a Python loop over the same parameters (`scan=False`), in which intermediate values can be
printed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.models.attention import Inputs
from research.models.block import Block
from research.types import Array, Params

Remat = Callable[..., bool] | str | None


@dataclasses.dataclass(frozen=True)
class Stack:
    """`pattern` repeated `count` times."""

    count: int
    pattern: tuple[Block, ...]


def stacks_of(blocks: Sequence[Block]) -> tuple[Stack, ...]:
    """One block a layer, as stacks: one cycle where the blocks repeat, else one stack for each run.

    Of both forms the one that has fewer blocks to compile; a cycle when they have as many.
    """
    L = len(blocks)
    starts = [n for n in range(L) if n == 0 or blocks[n] != blocks[n - 1]]
    for period in range(1, len(starts) + 1):
        if L % period == 0 and all(blocks[n] == blocks[n % period] for n in range(L)):
            return (Stack(L // period, tuple(blocks[:period])),)
    return tuple(
        Stack(stop - start, (blocks[start],))
        for start, stop in zip(starts, [*starts[1:], L], strict=True)
    )


def layers_of(stacks: Sequence[Stack]) -> list[tuple[str, int, int, Block]]:
    """Where each block's layers are: (path, first layer, step between its layers, block)."""
    found, first = [], 0
    for number, stack in enumerate(stacks):
        step = len(stack.pattern)
        for place, block in enumerate(stack.pattern):
            found.append((f"stack_{number}/block_{place}", first + place, step, block))
        first += stack.count * step
    return found


def run_stack(
    stack: Stack,
    params: Any,
    x: Array,
    inputs: Inputs,
    cache: Any = None,
    rng: Array | None = None,
    scan: bool = True,
    remat: Remat = None,
) -> tuple[Array, Any]:
    """x through all layers of one stack. `params` is stacked, or a tuple of one tree per layer.

    `rng` is for dropout, and every layer draws from its own; remat as in DecoderConfig.
    """
    held = len(params) if isinstance(params, tuple) else jax.tree.leaves(params)[0].shape[0]
    if held != stack.count:
        raise ValueError(f"a stack of {stack.count} layers was given the parameters of {held}")

    def cycle(x: Array, params: Params, cache: Any, index: Array | int) -> tuple[Array, Any]:
        new = {}
        for number, block in enumerate(stack.pattern):
            name = f"block_{number}"
            key = (
                None
                if rng is None
                else jax.random.fold_in(rng, index * len(stack.pattern) + number)
            )
            x, new[name] = block.apply(
                {"params": params[name]},
                x,
                inputs,
                None if cache is None else cache[name],
                rngs=None if key is None else {"dropout": key},
            )
        return x, (None if cache is None else new)

    if remat is not None:
        policy = None if remat == "full" else remat
        cycle = jax.checkpoint(cycle, policy=policy, prevent_cse=not scan)
    if isinstance(params, tuple) or not scan:
        return loop_layers(cycle, params, x, cache, stack.count)
    return scan_layers(cycle, params, x, cache, stack.count)


def loop_layers(cycle, params: Any, x: Array, cache: Any, count: int) -> tuple[Array, Any]:
    """Layer after layer in Python."""
    caches = []
    for index in range(count):
        x, new = cycle(x, layer(params, index), layer(cache, index), index)
        caches.append(new)
    if cache is None or isinstance(cache, tuple):
        return x, (None if cache is None else tuple(caches))
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)


def scan_layers(cycle, params: Params, x: Array, cache: Any, count: int) -> tuple[Array, Any]:
    """lax.scan over the layer axis.

    The cache rides in the carry and is updated in place: as scanned input and output XLA would
    copy the whole of it in every call.
    """

    def body(carry, scanned):
        x, cache = carry
        params, index = scanned
        x, new = cycle(x, params, layer(cache, index), index)
        put = jax.lax.dynamic_update_index_in_dim
        cache = jax.tree.map(lambda whole, part: put(whole, part, index, 0), cache, new)
        return (x, cache), None

    (x, cache), _ = jax.lax.scan(body, (x, cache), (params, jnp.arange(count)))
    return x, cache


def layer(stacked: Any, index: Array | int) -> Any:
    """One layer of a stacked tree, or of a tuple of layers; None stays None."""
    if stacked is None or isinstance(stacked, tuple):
        return None if stacked is None else stacked[index]
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def per_layer(one: Any, count: int, stacked: bool) -> Any:
    """Zeros of the form of `one` for `count` layers: on a leading axis, or a tuple of trees."""
    if not stacked:
        return tuple(jax.tree.map(jnp.zeros_like, one) for _ in range(count))
    return jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype), one)


def init_stack(rng: Array, stack: Stack, x: Array, inputs: Inputs) -> Params:
    """Boxed parameters {block_0: ...} with a leading axis of `stack.count` layers.

    x [1, 1, D] and `inputs` are of the shapes that a forward pass would have.
    """

    def init_cycle(key: Array) -> Params:
        keys = jax.random.split(key, len(stack.pattern))
        return {
            f"block_{number}": block.init(keys[number], x, inputs)["params"]
            for number, block in enumerate(stack.pattern)
        }

    boxed = jax.vmap(init_cycle)(jax.random.split(rng, stack.count))
    return jax.tree.map(
        lambda box: box.add_axis(0, {nn.PARTITION_NAME: "layers"}),
        boxed,
        is_leaf=nn.meta.is_axis_metadata,
    )
