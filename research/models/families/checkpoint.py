"""What a family says about checkpoints: one table of names, read in both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from research.models.block import Block
from research.models.decoder import DecoderConfig
from research.models.stack import Stack


class ConfigError(ValueError):
    """A config that this code does not implement, or that contradicts itself."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of a packed matrix [in, out] are ours: [start, stop) of every `size` columns.

    One matrix that holds q, k and v side by side has size = out; one that holds them head by head
    has size = 3 * head size. The same for a bias [out].
    """

    start: int
    stop: int
    size: int

    def packed(self, columns: int) -> int:
        """How many columns the packed matrix has if ours are `columns`."""
        return columns // (self.stop - self.start) * self.size

    def of(self, packed: np.ndarray) -> np.ndarray:
        """[..., packed columns] -> [..., ours]; a view where one group holds everything."""
        groups = packed.reshape(*packed.shape[:-1], -1, self.size)
        return groups[..., self.start : self.stop].reshape(*packed.shape[:-1], -1)

    def put(self, packed: np.ndarray, ours: np.ndarray) -> None:
        """The inverse of `of`: writes our columns into `packed`, in place."""
        groups = packed.reshape(*packed.shape[:-1], -1, self.size)
        width = self.stop - self.start
        groups[..., self.start : self.stop] = ours.reshape(*groups.shape[:-1], width)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our leaves and the checkpoint tensor(s) it is made of.

    path       'stack_0/block_0/attention/q/kernel'
    name       'model.layers.{layer}.self_attn.q_proj.weight'; '{layer}' when our leaf is stacked
    transpose  the checkpoint holds [out, in] where we hold [in, out]
    columns    the tensor holds other leaves too, and these columns (after `transpose`) are ours
    first      the checkpoint's number of our first layer
    step       how many layers of the checkpoint lie between two of ours, 1 when none does
    """

    path: str
    name: str
    transpose: bool = False
    columns: Columns | None = None
    first: int = 0
    step: int = 1

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name

    def name_of(self, layer: int | None) -> str:
        """The tensor that holds our layer `layer` (None: the leaf is not stacked)."""
        return (
            self.name if layer is None else self.name.format(layer=self.first + self.step * layer)
        )


def packed(name: str, widths: dict[str, int], transpose: bool = False) -> list[Entry]:
    """Entries for one tensor that holds several leaves.

    widths: {path: columns of that leaf in one group}, in the order in which the group has them.
    """
    entries, start, size = [], 0, sum(widths.values())
    for path, width in widths.items():
        entries.append(Entry(path, name, transpose, Columns(start, start + width, size)))
        start += width
    return entries


def placed(
    block: Iterable[Entry], path: str, name: str, first: int = 0, step: int = 1
) -> list[Entry]:
    """The entries of one block where it stands: paths under `path`, names under `name`."""
    return [
        dataclasses.replace(
            entry, path=f"{path}/{entry.path}", name=f"{name}.{entry.name}", first=first, step=step
        )
        for entry in block
    ]


def require(config: dict, name: str) -> object:
    """config[name]; ConfigError naming the field when it is missing."""
    if name not in config:
        raise ConfigError(f"config.json lacks the field {name!r}")
    return config[name]


def refuse(config: dict, name: str, *allowed: object) -> None:
    """ConfigError unless the field is absent or has one of the values this code implements."""
    if name in config and config[name] not in allowed:
        choices = " or ".join(repr(value) for value in allowed)
        raise ConfigError(
            f"config.json: {name} = {config[name]!r} is not implemented, only {choices}"
        )


# How a model runs and how it was trained, which say nothing about what it computes.
FREE = ("dtype", "attend", "scan", "remat", "init_std", "init_rules", "dropout")


def require_same(config: DecoderConfig, written: DecoderConfig, architecture: str) -> None:
    """ConfigError naming the first part of `config` that `written` would lose."""
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(written, field.name)
        if field.name not in FREE and _function(ours) != _function(theirs):
            raise ConfigError(f"{architecture} has no {field.name} = {ours}, only {theirs}")


def _function(part: Any) -> Any:
    """A field of a DecoderConfig without what matters only in training; stacks as one block a layer."""
    if isinstance(part, tuple) and all(isinstance(stack, Stack) for stack in part):
        return [_undropped(block) for stack in part for block in stack.pattern * stack.count]
    return dataclasses.replace(part, init_std=0.0) if hasattr(part, "init_std") else part


def _undropped(block: Block) -> Block:
    return block.clone(dropout=0.0, attention=block.attention.clone(dropout=0.0))
