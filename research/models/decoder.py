"""The one decoder trunk: every family is a DecoderConfig of parts.

The trunk is a tuple of stacks (count, pattern), see `stack`; most families have one stack whose
pattern is one block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.kernels.attend import Attend, reference
from research.kernels.mask import Mask
from research.kernels.select import attend_auto
from research.models.arrange import arrange, require_positions
from research.models.attention import Cache, Inputs
from research.models.block import Block
from research.models.init import Rules, begin
from research.models.layers import Embedding, RMSNorm, dropout
from research.models.position import NoPosition, Rope
from research.models.stack import Remat, Stack, init_stack, layer, per_layer, run_stack
from research.types import Array, Params
from research.weights.base import is_weight


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A family's parts. `head` None means tied to the embedding table.

    init_std is the embedding table's; every other leaf begins as its layer says, or as the first of
    `init_rules` that matches its path says. Token embeddings are multiplied by `embed_scale` where
    they are read, not in a tied head (sqrt(width): Vaswani et al. 2017, section 3.4). `dropout` is
    the rate of the embeddings; Block and Attention have their own.
    """

    vocab_size: int
    width: int
    stacks: tuple[Stack, ...]
    max_length: int
    position: NoPosition = Rope()
    final_norm: nn.Module | None = RMSNorm()
    head: nn.Module | None = None
    dtype: Any = jnp.float32
    attend: Attend = attend_auto
    scan: bool = True
    remat: Remat = None  # None, "full", or a jax.checkpoint policy
    init_std: float = 0.02
    init_rules: Rules = ()
    embed_scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self):
        most = self.position.most
        if most is not None and self.max_length > most:
            raise ValueError(f"max_length {self.max_length} is more than {self.position} has")

    @property
    def layers(self) -> int:
        return sum(stack.count * len(stack.pattern) for stack in self.stacks)


class Decoder(nn.Module):
    """tokens [B, T] -> logits [B, T, V] float32; with a cache, (logits, cache)."""

    config: DecoderConfig

    # Parameters that may stand beside the trunk's own: `heads` keeps a head there.
    beside = ("score",)

    @property
    def before(self) -> int:
        """Slots that every row begins with, before its tokens; they count towards the context."""
        return 0

    def setup(self):
        config = self.config
        self.embed = Embedding(config.vocab_size, config.width, config.init_std)
        self.final_norm = None if config.final_norm is None else config.final_norm.copy()
        self.head = None if config.head is None else config.head.copy()
        self.position = config.position.embedding(config.width)
        if not self.is_initializing():
            return
        x, at = jnp.zeros((1, 1, config.width), config.dtype), jnp.zeros((1, 1), jnp.int32)
        tables = config.position.tables(at, head_size(config))
        inputs = Inputs(tables, Mask(), config.position, reference, at)
        for number, stack in enumerate(config.stacks):
            self.param(f"stack_{number}", init_stack, stack, x, inputs)

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
    ) -> Array | tuple[Array, Cache]:
        states = self.hidden(tokens, positions, segment_ids, mask, cache)
        if cache is None:
            return self.project(states)
        states, cache = states
        return self.project(states), cache

    def hidden(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
    ) -> Array | tuple[Array, Cache]:
        """The states [B, T, D] that the head multiplies, for losses fused with the head.

        Errors as in `enter`.
        """
        config = self.config
        x, inputs, past = self.enter(tokens, positions, segment_ids, mask, cache)
        layers = []
        for number, stack in enumerate(config.stacks):
            params = self.get_variable("params", f"stack_{number}")
            layer_cache = None if past is None else past.layers[number]
            rng = self.make_rng("dropout") if self.has_rng("dropout") else None
            x, layer_cache = run_stack(
                stack, params, x, inputs, layer_cache, rng, config.scan, config.remat
            )
            layers.append(layer_cache)
        if self.final_norm is not None:
            x = self.final_norm(x)
        return x if past is None else (x, past.replace(layers=tuple(layers)))

    def enter(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
    ) -> tuple[Array, Inputs, Cache | None]:
        """The states [B, T, D] before the first layer, what all layers share, and the cache with the
        tokens' slots taken.

        ValueError naming parameters that this model does not read.
        """
        config = self.config
        require_known(self)
        alone = positions is None and segment_ids is None and cache is None
        mask, positions, past = arrange(
            tokens, positions, segment_ids, mask or Mask(), cache, config.position
        )
        tables = config.position.tables(positions, head_size(config))
        inputs = Inputs(tables, mask, config.position, config.attend, positions)
        x = self.embed(tokens).astype(config.dtype)
        if config.embed_scale != 1:
            x *= jnp.asarray(config.embed_scale, x.dtype)
        if self.position is not None:
            # Padding stands at 0: however much there is, it asks for no row that a table lacks.
            at = positions if segment_ids is None else jnp.where(segment_ids == 0, 0, positions)
            require_positions(config.position.most, tokens.shape[1] - 1 if alone else at)
            x += self.position(at).astype(x.dtype)
        return dropout(self, x, config.dropout), inputs, past

    def start(
        self, batch: int, length: int | None, dtype: Any = None, stacked: bool = True
    ) -> Cache:
        """The cache that rows begin with, an empty one; arguments are those of `empty_cache`."""
        return empty_cache(self, batch, length, dtype, stacked)

    def begin(self) -> Array:
        """What `init` runs: every parameter outside the stacks is met, and no token placed."""
        at = jnp.zeros((1, 1), jnp.int32)
        x = self.embed(at)
        if self.position is not None:
            x += self.position(at)
        return self.project(x if self.final_norm is None else self.final_norm(x))

    def project(self, states: Array) -> Array:
        """States [..., D] -> logits [..., V] float32: the head alone."""
        logits = self.embed.attend(states) if self.head is None else self.head(states)
        return logits.astype(jnp.float32)


def require_known(model: Decoder) -> None:
    """ValueError when the parameters hold what the model would pass over."""
    optional = ("position", "final_norm", "head")
    own = {"embed", *model.beside, *(n for n in optional if getattr(model, n) is not None)}
    own |= {f"stack_{number}" for number in range(len(model.config.stacks))}
    unknown = sorted(set(model.variables.get("params", {})) - own)
    if unknown:
        raise ValueError(f"a {type(model).__name__} does not read the parameters {unknown}")


def head_size(config: DecoderConfig) -> int:
    """That of every block: they share the tables of positions."""
    blocks: list[Block] = [block for stack in config.stacks for block in stack.pattern]
    sizes = {block.attention.head_size for block in blocks}
    if len(sizes) != 1:
        raise ValueError(f"blocks of one model share a head size, these have {sorted(sizes)}")
    return sizes.pop()


def init(model: Decoder, rng: Array) -> Params:
    """Fresh parameters: a nested dict of float32 arrays."""
    params = nn.meta.unbox(model.init(rng, method="begin")["params"])
    return begin(params, model.config.init_rules, rng)


def axes(model: Decoder) -> Params:
    """The tree of `init`, each leaf a tuple of logical axis names. Nothing is allocated."""
    boxed = jax.eval_shape(partial(model.init, method="begin"), jax.random.key(0))["params"]
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=nn.meta.is_axis_metadata)


def count_parameters(model: Decoder) -> int:
    """Exact, from the shapes of `init`. Nothing is allocated."""
    shapes = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def unstack(
    tree: Params, change: Callable[[Any], Any] = lambda w: w, donate: bool = False
) -> Params:
    """Every stack_* entry as a tuple of one tree per layer: what decoding on a CPU wants.

    A scanned stack reads each layer's matrices through a copy; separate arrays are read in place.
    `change` is applied to each layer's matrices and Weights, also where layers are apart already.
    With `donate` the stacked arrays are deleted one after another, so that no second copy of the
    parameters ever exists.
    """
    return {
        name: split_layers(value, change, donate) if name.startswith("stack_") else value
        for name, value in tree.items()
    }


def split_layers(stacked: Params, change: Callable[[Any], Any], donate: bool) -> tuple[Params, ...]:
    """A stacked tree [L, ...], or a tuple of L trees, as L trees."""
    if isinstance(stacked, tuple):
        return tuple(jax.tree.map(change, tree, is_leaf=is_weight) for tree in stacked)

    def split(node: Any) -> list:
        count = jax.tree.leaves(node)[0].shape[0]
        layers = jax.block_until_ready([change(layer(node, index)) for index in range(count)])
        if donate:
            jax.tree.map(lambda leaf: leaf.delete() if isinstance(leaf, jax.Array) else None, node)
        return layers

    nodes, tree = jax.tree.flatten(stacked, is_leaf=is_weight)
    return tuple(map(tree.unflatten, zip(*map(split, nodes), strict=True)))


def restack(tree: Params) -> Params:
    """The inverse of `unstack`: the form in which parameters are saved and adapted."""

    def stacked(layers: Any) -> Params:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    return {
        name: stacked(value) if isinstance(value, tuple) else value for name, value in tree.items()
    }


def empty_cache(
    model: Decoder, batch: int, length: int | None, dtype: Any = None, stacked: bool = True
) -> Cache:
    """A cache of `length` slots. `stacked=False` goes with unstacked parameters.

    Without a length it has no end, for models whose layers keep a bounded part of the past
    (`sinks`, `linear_attention`); ValueError for others.
    """
    config = model.config
    dtype = config.dtype if dtype is None else dtype

    def of(stack: Stack) -> Any:
        one = {
            f"block_{number}": block.attention.empty_cache(batch, length, dtype)
            for number, block in enumerate(stack.pattern)
        }
        return per_layer(one, stack.count, stacked)

    return Cache(
        layers=tuple(of(stack) for stack in config.stacks),
        segment_ids=None if length is None else jnp.zeros((batch, length), jnp.int32),
        index=jnp.zeros((), jnp.int32),
        lengths=jnp.zeros((batch,), jnp.int32),
        context=config.position.context(batch),
    )
