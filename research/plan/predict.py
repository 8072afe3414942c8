"""A plan: everything that is known of a step on some devices before it runs.

work = Work(PRESETS["llama-7b"], METHODS["qlora"], rows=64, length=2048)
plan = predict(work, 8, H100)
plan.memory.total, plan.fits, plan.seconds
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from research.plan.devices import Device
from research.plan.memory import Memory, compiled_update, memory, mesh_of, placed
from research.plan.seconds import Cost, cost
from research.plan.work import Work


@dataclass(frozen=True)
class Plan:
    """`memory` and `cost` of one of `count` devices; `work` is the whole step.

    notes   axes that the mesh does not divide, and that are copied to all devices
    """

    work: Work
    count: int
    copies: int
    device: Device
    memory: Memory
    cost: Cost
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.device.memory_bytes

    @property
    def flops(self) -> float:
        """Of the whole step, all devices together."""
        return self.cost.flops * self.count

    @property
    def seconds(self) -> float:
        """ValueError when the device's speed is not known."""
        return self.cost.seconds(self.device)


def predict(work: Work, count: int, device: Device, copies: int = 1, whole: bool = False) -> Plan:
    """`work` on `count` devices: so many `copies` of the model, each divided over the rest (fsdp).

    whole: compile and count the model in its full depth instead of extrapolating. ValueError when
    rows or devices do not divide.
    """
    if count < 1 or copies < 1 or count % copies:
        raise ValueError(f"{copies} copies of the model do not divide {count} devices")
    if work.rows % count:
        raise ValueError(
            f"{work.rows} rows do not divide over {count} devices; take a multiple of {count}"
        )
    config = dataclasses.replace(work.config, dtype=device.dtype)
    one = dataclasses.replace(work, config=config, rows=work.rows // count)
    place, update = placed(one, mesh_of(copies, count // copies)), compiled_update(one)
    held = memory(one, place, update, whole)
    spent = cost(one, place, held, update, whole)
    return Plan(work, count, copies, device, held, spent, tuple(place.notes))
