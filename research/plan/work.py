"""The step that is planned: a model, a way to train it, and a batch. Shapes only, never arrays."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from research.models.decoder import Decoder, DecoderConfig, axes, init
from research.objectives import next_token
from research.train.optim import AdamW, AdamW8bit, Optimizer
from research.train.partition import Rule
from research.types import Array, Batch, Objective, Params, PyTree
from research.weights import lora
from research.weights.base import change, leaf_axes
from research.weights.formats import Codebook
from research.weights.quantized import Quantized, encode

LINEAR = r"stack_\d+/.*/kernel"  # every matrix of a block
NF4 = Codebook("NF4", 64, double=True)


@dataclass(frozen=True)
class Method:
    """A way to train.

    rank       of a LoRA on every matrix of a block; 0 trains all parameters
    quantized  those matrices are NF4 with double quantization
    remat      every layer is computed again in the backward pass
    """

    rank: int = 0
    quantized: bool = False
    remat: bool = False
    optimizer: Optimizer = AdamW(lr=1e-4)

    def __post_init__(self):
        if self.rank < 0 or (self.quantized and not self.rank):
            raise ValueError("rank is at least 0, and codes do not train: they need a rank above 0")

    @property
    def rule(self) -> Rule:
        return ((lora.TRAINABLE, True), (r".*", False)) if self.rank else r".*"

    @property
    def passes(self) -> int:
        """How often a step reads the parameters: forward, backward, and forward once more."""
        return 3 if self.remat else 2


METHODS = {
    "full": Method(),
    "full-remat": Method(remat=True),
    "lora": Method(rank=16),
    "lora-remat": Method(rank=16, remat=True),
    "qlora": Method(rank=16, quantized=True, remat=True, optimizer=AdamW8bit(lr=1e-4)),
}


@dataclass(frozen=True)
class Work:
    """One step of `method` on `rows` rows of `length` tokens, all of which have a loss.

    The model computes in `config.dtype`; what does not train is held in it too, what trains in
    float32. ValueError for a length that the model does not have.
    """

    config: DecoderConfig
    method: Method
    rows: int
    length: int

    def __post_init__(self):
        if self.rows < 1 or not 1 <= self.length <= self.config.max_length:
            raise ValueError(
                f"expected at least one row of 1 to {self.config.max_length} tokens, "
                f"not {self.rows} of {self.length}"
            )

    @property
    def counts(self) -> tuple[int, ...]:
        """How often each stack repeats its pattern."""
        return tuple(stack.count for stack in self.config.stacks)

    @property
    def model(self) -> Decoder:
        remat = "full" if self.method.remat else None
        return Decoder(dataclasses.replace(self.config, remat=remat))

    @property
    def objective(self) -> Objective:
        return next_token(self.model)

    def deep(self, counts: tuple[int, ...]) -> Work:
        """The same of a model whose stacks repeat their patterns so often."""
        pairs = zip(self.config.stacks, counts, strict=True)
        stacks = tuple(dataclasses.replace(stack, count=count) for stack, count in pairs)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, stacks=stacks))

    def parameters(self) -> Params:
        """The tree that training begins with, as shapes."""
        return jax.eval_shape(self.initial, jax.random.key(0))

    def initial(self, rng: Array) -> Params:
        """The same as arrays, freshly drawn."""
        method, params = self.method, init(self.model, rng)
        if method.rank:
            params = jax.tree.map(lambda leaf: leaf.astype(self.config.dtype), params)
        if method.quantized:
            params = change(params, LINEAR, in_few_bits)
        return lora.add(params, LINEAR, rng, method.rank) if method.rank else params

    def axes(self) -> PyTree:
        """Logical axis names of each leaf of `parameters`."""
        return leaf_axes(self.parameters(), axes(self.model))

    def batch(self) -> Batch:
        """Shapes of a packed batch, [rows, length]."""
        names = ("tokens", "targets", "segment_ids", "positions")
        shape = (self.rows, self.length)
        ints = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
        return ints | {"weights": jax.ShapeDtypeStruct(shape, jnp.float32)}


def in_few_bits(name: str, w: Any, number: int) -> Quantized:
    """A kernel [..., in, out] in NF4; ValueError naming one whose columns its groups do not fill."""
    try:
        return encode(w.mT, NF4, True)
    except ValueError as error:
        raise ValueError(f"{name} {w.shape}: {error}") from error
