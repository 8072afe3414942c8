"""What a family says about checkpoints: one table of names, read in both directions."""

from __future__ import annotations

import dataclasses


class ConfigError(ValueError):
    """A config that this code does not implement, or that contradicts itself."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our leaves and the checkpoint tensor(s) it is made of.

    path       'stack_0/block_0/attention/q/kernel'
    name       'model.layers.{layer}.self_attn.q_proj.weight'; '{layer}' when our leaf is stacked
    transpose  the checkpoint holds [out, in] where we hold [in, out]
    """

    path: str
    name: str
    transpose: bool = False

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name


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
