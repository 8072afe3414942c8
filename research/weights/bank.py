"""Many LoRAs on one model, one for each example of a batch.

    row x of example i:   x W + s_e x A_e B_e,  e = ids[i],  and x W alone where ids[i] = -1

Punica (Chen et al. 2023, arXiv:2310.18547) and S-LoRA (Sheng et al. 2023, arXiv:2311.03285) serve
adapters so: the product with W is one for the whole batch, and each example gathers its thin
factors. Their kernels gather while they multiply; here XLA gathers first, B pairs of factors at once.

    params = bank.stack([first, second])                 # models of one base, other LoRA factors
    model.apply({"params": bank.choose(params, [0, 1, -1])}, tokens)      # tokens [3, T]

The ids are a leaf of every node, with the layer axis before them, so scans slice them like the rest
and no model knows of it. What is multiplied must hold the examples one after another, each with as
many rows: [B, T, ...] as everywhere here, or [B, K, T, ...] for K beams an example.

Ranks may differ: factors are padded with zeros. An adapter without a LoRA where another has one
gets zeros there. Dropout is not kept: a bank is for evaluation and decoding. E = 1 is LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from research.paths import map_named, named_leaves
from research.types import Array, Params
from research.weights import lora
from research.weights.base import Call, Weight, is_weight, matmul, matmul_transposed, take
from research.weights.lora import LoRA


@struct.dataclass
class Bank(Weight):
    """base [..., in, out], a [..., E, in, R], b [..., E, R, out], a scale for each of E adapters.

    ids [..., B] int32 in -1..E-1, None before `choose`.
    """

    base: Any
    a: Array
    b: Array
    scales: tuple[float, ...] = struct.field(pytree_node=False)
    ids: Array | None = None

    def dense(self) -> Array:
        raise ValueError(
            f"a bank of {len(self.scales)} adapters is no one matrix: take one with `bank.pick`"
        )

    def matmul(self, x: Array, call: Call) -> Array:
        return matmul(x, self.base, call) + self._branch(x, self.a, self.b)

    def matmul_transposed(self, x: Array, call: Call) -> Array:
        return matmul_transposed(x, self.base, call) + self._branch(x, self.b.mT, self.a.mT)

    def take(self, ids: Array, call: Call) -> Array:
        """ids [B, ...]."""
        adapter = jnp.repeat(self._clipped(), self._rows(ids.size))
        rows = self.a.at[adapter, ids.reshape(-1)].get(mode="fill")
        return take(self.base, ids, call) + self._onto(rows, self.b).reshape(*ids.shape, -1)

    def axes(self, names: tuple) -> Bank:
        base = self.base.axes(names) if is_weight(self.base) else names
        *layers, inner, outer = names
        ids = None if self.ids is None else (*layers, None)
        a, b = (*layers, None, inner, "rank"), (*layers, None, "rank", outer)
        return self.replace(base=base, a=a, b=b, ids=ids)

    def _branch(self, x: Array, left: Array, right: Array) -> Array:
        """x [M, in] through each example's own left [E, in, R] and right [E, R, out]."""
        rows = self._rows(x.shape[0])
        mine = left.at[self._clipped()].get(mode="fill").astype(x.dtype)
        return self._onto((x.reshape(-1, rows, x.shape[1]) @ mine).reshape(x.shape[0], -1), right)

    def _onto(self, inner: Array, right: Array) -> Array:
        """scale * inner [M, R] right [E, R, out], 0 for examples of the base alone."""
        ids = self._clipped()
        mine = right.at[ids].get(mode="fill").astype(inner.dtype)
        scale = jnp.asarray(self.scales, inner.dtype).at[ids].get(mode="fill")
        y = scale[:, None, None] * (inner.reshape(ids.size, -1, inner.shape[1]) @ mine)
        return jnp.where((self.ids >= 0)[:, None, None], y, 0).reshape(inner.shape[0], -1)

    def _clipped(self) -> Array:
        """The ids with 0 for -1, whose product is thrown away."""
        if self.ids is None:
            raise ValueError("a bank multiplies after `bank.choose` has said which adapters")
        return jnp.maximum(self.ids, 0)

    def _rows(self, count: int) -> int:
        """Rows of one example, of `count` in all; ValueError when they do not divide."""
        B = self._clipped().size
        if count % B:
            raise ValueError(
                f"{count} rows are not those of {B} examples, for which ids were chosen"
            )
        return count // B


def stack(adapters: Sequence[Params]) -> Params:
    """One model with a Bank wherever one of `adapters` has a LoRA; adapter e is `adapters[e]`.

    ValueError naming the path where they are not the same but for their LoRAs.
    """
    base, factors = align(adapters)

    def bank(name: str, w: Any) -> Any:
        nodes = [found.get(name) for found in factors]
        some = [node for node in nodes if node is not None]
        if not some:
            return w
        rank = max(node.a.shape[-1] for node in some)
        pairs = [padded(node, some[0], rank) for node in nodes]
        a, b = (jnp.stack(parts, axis=-3) for parts in zip(*pairs, strict=True))
        return Bank(w, a, b, tuple(1.0 if node is None else node.scale for node in nodes))

    return map_named(bank, base, is_leaf=is_weight)


def padded(node: LoRA | None, other: LoRA, rank: int) -> tuple[Array, Array]:
    """a [..., in, rank] and b [..., rank, out] of `node`, of zeros when it is None."""
    if node is None:
        node = other.replace(a=jnp.zeros_like(other.a), b=jnp.zeros_like(other.b))
    none, more = (0, 0), (0, rank - node.a.shape[-1])
    layers = [none] * (node.a.ndim - 2)
    return jnp.pad(node.a, [*layers, none, more]), jnp.pad(node.b, [*layers, more, none])


def align(adapters: Sequence[Params]) -> tuple[Params, list[dict[str, LoRA]]]:
    """What the models share, and the LoRAs of each by path.

    ValueError naming the path of what is neither shared nor a LoRA, or when no model has one.
    """
    bases = [lora.remove(params) for params in adapters]
    for number, other in enumerate(bases[1:], start=1):
        require_same(bases[0], other, number)
    leaves = [named_leaves(params, is_leaf=is_weight) for params in adapters]
    factors = [{name: w for name, w in found if isinstance(w, LoRA)} for found in leaves]
    if not any(factors):
        raise ValueError(f"there is no LoRA in any of the {len(factors)} models")
    return bases[0], factors


def require_same(first: Params, other: Params, number: int) -> None:
    """ValueError naming a leaf that model 0 and model `number` do not share."""
    ours, theirs = dict(named_leaves(first)), dict(named_leaves(other))
    for name in sorted(ours.keys() ^ theirs.keys()):
        raise ValueError(f"models 0 and {number} do not share a base: only one has {name}")
    for name, leaf in ours.items():
        if leaf is not theirs[name] and not jnp.array_equal(leaf, theirs[name]):
            raise ValueError(f"models 0 and {number} do not share a base: they differ at {name}")
    if jax.tree.structure(first) != jax.tree.structure(other):
        raise ValueError(f"models 0 and {number} do not share a base: other Weights stand in it")


def choose(params: Params, ids: Array | Sequence[int]) -> Params:
    """Params for a batch whose example i uses adapter ids[i], or the base alone where that is -1.

    ids [B]. ValueError when there is no bank, or an id is no adapter's (under jit, where that cannot
    be seen, its example is nan).
    """
    ids = jnp.asarray(ids, jnp.int32)
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError(f"ids: expected one for each example, [B], got shape {ids.shape}")
    banks = [w for _, w in named_leaves(params, is_leaf=is_bank) if is_bank(w)]
    if not banks:
        raise ValueError("there is no bank to choose from: make one with `bank.stack`")
    E = len(banks[0].scales)
    if not isinstance(ids, jax.core.Tracer) and not bool(((ids >= -1) & (ids < E)).all()):
        raise ValueError(f"ids {ids.tolist()}: there are adapters 0..{E - 1}, and -1 for none")

    def chosen(name: str, w: Any) -> Any:
        return (
            w.replace(ids=jnp.broadcast_to(ids, (*w.a.shape[:-3], ids.size))) if is_bank(w) else w
        )

    return map_named(chosen, params, is_leaf=is_bank)


def pick(params: Params, adapter: int) -> Params:
    """The model of one adapter as LoRAs, of the widest rank there; the inverse of `stack`.

    ValueError when there is no such adapter.
    """

    def one(name: str, w: Any) -> Any:
        if not is_bank(w):
            return w
        if not 0 <= adapter < len(w.scales):
            raise ValueError(f"{name} has adapters 0..{len(w.scales) - 1}, not {adapter}")
        return LoRA(w.base, w.a[..., adapter, :, :], w.b[..., adapter, :, :], w.scales[adapter])

    return map_named(one, params, is_leaf=is_bank)


def is_bank(node: Any) -> bool:
    return isinstance(node, Bank)
