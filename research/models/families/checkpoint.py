"""What a family says about checkpoints: one table of names, read in both directions."""

from __future__ import annotations

import dataclasses

import numpy as np


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
    """

    path: str
    name: str
    transpose: bool = False
    columns: Columns | None = None

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name


def packed(name: str, widths: dict[str, int], transpose: bool = False) -> list[Entry]:
    """Entries for one tensor that holds several leaves.

    widths: {path: columns of that leaf in one group}, in the order in which the group has them.
    """
    entries, start, size = [], 0, sum(widths.values())
    for path, width in widths.items():
        entries.append(Entry(path, name, transpose, Columns(start, start + width, size)))
        start += width
    return entries


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
