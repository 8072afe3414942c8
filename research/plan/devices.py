"""What computes: so many devices of one kind, with the numbers that a plan divides by.

    devices("8xh100") -> (8, H100)

Accelerators have the numbers of their makers' data sheets (SXM modules, dense products) and a
utilisation that is assumed, not measured. A CPU's are measured by whoever plans for it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp


@dataclass(frozen=True)
class Device:
    """One device.

    memory_bytes  what it has
    flop_s        of large matrix products in `dtype`; 0 where it is not known yet
    bandwidth     bytes a second of its memory
    link          bytes a second to other devices, in one direction
    utilisation   the part of `flop_s` that a training step reaches
    dtype         what models compute in
    measured      whether the numbers were, on this machine
    """

    name: str
    memory_bytes: float
    flop_s: float
    bandwidth: float
    link: float
    utilisation: float = 0.4
    dtype: Any = jnp.bfloat16
    measured: bool = False

    @property
    def reached(self) -> float:
        """FLOPs a second of a training step."""
        return self.flop_s * self.utilisation


A100 = Device("a100", 80e9, 312e12, 2.04e12, 300e9)
H100 = Device("h100", 80e9, 989e12, 3.35e12, 450e9)
H200 = Device("h200", 141e9, 989e12, 4.8e12, 450e9)
ACCELERATORS = {device.name: device for device in (A100, H100, H200)}
CPU = "cpu"


def devices(text: str) -> tuple[int, Device]:
    """'8xh100' -> (8, H100); 'h100' is one. 'cpu' is this machine, whose speed is still unknown.

    ValueError for anything else.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([\w.-]+)", text.strip().lower())
    count = int(found[1] or 1) if found else 0
    if count < 1:
        raise ValueError(f"devices are written like 8xh100 or cpu, not {text!r}")
    if found[2] != CPU:
        return count, named(found[2], ACCELERATORS, "device", (CPU,))
    if count > 1:
        raise ValueError("one cpu is this machine; there is no link between several to plan for")
    return 1, this_cpu()


def this_cpu() -> Device:
    """This machine's memory. Speeds are 0 until they are measured."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(CPU, memory, 0.0, 0.0, 0.0, 1.0, jnp.float32)


def named(name: str, table: dict[str, Any], what: str, more: Iterable[str] = ()) -> Any:
    """`table[name]`; ValueError with the closest names, and all where none is close."""
    if name in table:
        return table[name]
    names = [*table, *more]
    close = difflib.get_close_matches(name, names, n=5) or names
    raise ValueError(f"no {what} {name!r}; there are {', '.join(close)}")
