"""Prompt tuning: P trained rows of an embedding table, read before the text. The model is frozen.

Lester et al. 2021 (arXiv:2104.08691); with rows from a network, P-tuning: see `prompt_encoder`.

    ids 0..V-1 read the table as before,   V..V+P-1 read the prompt

    params = prompt.add(params, rng, length=20)
    generate(model, params, prompt.before(params, texts), rng)     # and data.supervised.prepend

A virtual token is an id like others, so it has a position, a place in the cache and a share of the
context, and packed rows hold one copy of the prompt an example. It is only read: a head tied to the
table multiplies by the base's V rows, and no virtual id is ever said. Nothing says that the prompt
stands first; P-tuning's templates are ids in another order.

Differences and choices:
1. The paper's rows begin as those of frequent tokens or of the labels (`sampled`, `text`), or uniform
   in [-0.5, 0.5]; Hugging Face PEFT's begin as N(0, 1) unless it is told otherwise.
2. `DecoderConfig.embed_scale` and the dropout of embeddings are applied to virtual tokens too.
3. The paper prepends to a T5's source; here too, where parameters are a Seq2Seq's.
4. A prompt may stand on a prompt: its ids follow, and one batch mixes tasks (the paper's figure 2).

An id of V + P or more is refused by `decode`; under jit it reads nan, which no loss survives unseen.
No matrix says this, so `base.merge` refuses and names the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from research.paths import map_named
from research.types import Array, Params
from research.weights.base import (
    EVALUATE,
    Call,
    Weight,
    change,
    is_weight,
    matmul,
    matmul_transposed,
    row_count,
    take,
)
from research.weights.prompt_encoder import Encoder, is_encoder, width

# A path rule for `partition`: the rows, or the network that they come from.
TRAINABLE = r".*/table/prompt(/.*)?"

# (table, key, P) -> rows [P, D], or an Encoder that gives them
Initial = Callable[[Any, Array, int], Array | Encoder]


@struct.dataclass
class Prompt(Weight):
    """`base` [V, D] and, below it, the rows [P, D]: an array, or an Encoder that gives them."""

    base: Any
    prompt: Array | Encoder

    @property
    def length(self) -> int:
        """P."""
        rows = self.prompt.embedding if is_encoder(self.prompt) else self.prompt
        return rows.shape[0]

    def rows(self, call: Call = EVALUATE) -> Array:
        """[P, D]."""
        return self.prompt.encode(call) if is_encoder(self.prompt) else self.prompt

    def dense(self) -> Array:
        raise ValueError(
            f"a Prompt has {self.length} rows that are read and never said, which no matrix can "
            "say: keep it, or give it up (`prompt.remove`)"
        )

    def matmul(self, x: Array, call: Call) -> Array:
        return matmul(x, self.base, call)

    def matmul_transposed(self, x: Array, call: Call) -> Array:
        return matmul_transposed(x, self.base, call)

    def take(self, ids: Array, call: Call) -> Array:
        V = row_count(self.base)
        virtual = ids >= V
        # Each side reads row 0 for the other's ids, so that neither's gradient meets a nan.
        rows = take(self.base, jnp.where(virtual, 0, ids), call)
        place = jnp.where(virtual, ids - V, 0)
        own = jnp.take(self.rows(call), place, axis=0, mode="fill")
        return jnp.where(virtual[..., None], own, rows)

    def row_count(self) -> int:
        return row_count(self.base) + self.length

    def axes(self, names: tuple) -> Prompt:
        base = self.base.axes(names) if is_weight(self.base) else names
        own = (None, names[-1])
        return Prompt(base, self.prompt.axes(names[-1]) if is_encoder(self.prompt) else own)


def is_prompt(node: Any) -> bool:
    return isinstance(node, Prompt)


def normal(table: Any, rng: Array, length: int, std: float = 1.0) -> Array:
    """Rows ~ N(0, std²)."""
    return std * jax.random.normal(rng, (length, width(table)))


def uniform(table: Any, rng: Array, length: int, bound: float = 0.5) -> Array:
    """Rows ~ U(-bound, bound)."""
    return jax.random.uniform(rng, (length, width(table)), minval=-bound, maxval=bound)


def sampled(table: Any, rng: Array, length: int, most: int | None = None) -> Array:
    """Rows of tokens drawn from the vocabulary's first `most`, by default from all of it.

    The paper draws from the 5000 most frequent, which are the first where ids go by frequency.
    """
    while is_prompt(table):
        table = table.base
    V = row_count(table)
    if most is not None and not 1 <= most <= V:
        raise ValueError(f"most: expected 1..{V}, the tokens of the vocabulary, got {most}")
    ids = jax.random.randint(rng, (length,), 0, V if most is None else most)
    return take(table, ids).astype(jnp.float32)


def text(table: Any, rng: Array, length: int, ids: Sequence[int] = ()) -> Array:
    """The rows of the text `ids` (an instruction, or the labels), repeated or cut to `length`."""
    readable = row_count(table)
    if not len(ids) or min(ids) < 0 or max(ids) >= readable:
        raise ValueError(f"a prompt begun as text needs ids in 0..{readable - 1}, not {list(ids)}")
    repeated = jnp.resize(jnp.asarray(ids, jnp.int32), length)
    return take(table, repeated).astype(jnp.float32)


def add(
    params: Params,
    rng: Array,
    length: int = 20,
    initial: Initial = sampled,
    rule: str = r"embed/table",
) -> Params:
    """Params whose embedding table has `length` virtual tokens more.

    initial: `normal`, `uniform`, `sampled`, partial(text, ids=...), or `prompt_encoder.mlp` and
    `lstm`. Rows are float32. RuleError when the rule matches nothing; ValueError for a leaf that is
    no table, a length below 1, or rows that are not [length, D].
    """
    if length < 1:
        raise ValueError(f"a prompt needs a length of at least 1, not {length}")

    def wrap(name: str, w: Any, number: int) -> Prompt:
        if not name.endswith("/table"):
            raise ValueError(f"a prompt stands on embedding tables (.../table), not {name}")
        node = Prompt(w, initial(w, jax.random.fold_in(rng, number), length))
        shape = jax.eval_shape(node.rows).shape
        if shape != (length, width(w)):
            raise ValueError(f"{name}: rows {shape} for a prompt of {(length, width(w))}")
        return node

    return change(params, rule, wrap)


def ids(params: Params) -> list[int]:
    """The virtual ids V..V+P-1 of the prompt that was added last. ValueError when there is none."""
    nodes = [node for node in jax.tree.leaves(params, is_leaf=is_prompt) if is_prompt(node)]
    if not nodes:
        raise ValueError("there is no prompt among the parameters: add one with `prompt.add`")
    return list(range(row_count(nodes[0].base), nodes[0].row_count()))


def before(params: Params, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """`prompts` for `decode.generate` and its kin, each after the virtual ids."""
    virtual = ids(params)
    return [[*virtual, *prompt] for prompt in prompts]


def finish(params: Params) -> Params:
    """The same function with every Encoder replaced by the rows that it gives: what decoding and
    saving want."""
    return jax.tree.map(
        lambda node: node.encode(EVALUATE) if is_encoder(node) else node,
        params,
        is_leaf=is_encoder,
    )


def remove(params: Params) -> Params:
    """The model without the prompt that was added last."""
    return map_named(lambda name, w: w.base if is_prompt(w) else w, params, is_leaf=is_prompt)
