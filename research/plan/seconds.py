"""FLOPs of a step and the time it should take.

FLOPs are XLA's count for the program before it is compiled, its layers one after another and without
the loops of attention in tiles and of the fused loss, because of a loop only one round is counted. So
the T×S scores count whole, causal or not. What is computed again in the backward pass is in it.

    seconds = max(FLOPs / reached, bytes of parameters read / bandwidth, bytes gathered / link)
              + bytes of the update / bandwidth
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from jax import eval_shape

from research.kernels.attend import reference
from research.models.decoder import unstack
from research.objectives import next_token
from research.plan.depth import in_depth
from research.plan.devices import Device
from research.plan.memory import Memory, Placed, local_bytes, share
from research.plan.program import gradients_lowered, state_bytes
from research.plan.work import Work


@dataclass(frozen=True)
class Cost:
    """Of one device in one step: arithmetic, and bytes read by the passes over the model, moved by
    the update, and received from other devices."""

    flops: float
    read_bytes: float
    update_bytes: float
    gathered_bytes: float

    def seconds(self, device: Device) -> float:
        """ValueError when the device's speed is not known."""
        if not device.flop_s or not device.bandwidth:
            raise ValueError(f"the speed of {device.name} is not known; measure it first")
        link = self.gathered_bytes / device.link if self.gathered_bytes else 0.0
        model = max(self.flops / device.reached, self.read_bytes / device.bandwidth, link)
        return model + self.update_bytes / device.bandwidth


def cost(work: Work, place: Placed, memory: Memory, update: Any, whole: bool = False) -> Cost:
    """Of the device that has all rows of `work`; `update` is its compiled update."""
    part, moved = share(place), update.cost_analysis()
    model = in_depth(lambda counts: model_flops(work.deep(counts)), work.counts, whole)
    return Cost(
        flops=model + part * moved.get("flops", 0.0),
        read_bytes=work.method.passes * state_bytes(place.params),
        update_bytes=part * moved["bytes accessed"] + memory.gradients,
        gathered_bytes=gathered_bytes(work, place),
    )


def model_flops(work: Work) -> float:
    """Of loss and gradients, in a form without loops."""
    config = dataclasses.replace(work.model.config, scan=False, attend=reference)
    objective = next_token(work.model.clone(config=config), fused=False)
    apart = eval_shape(unstack, work.parameters())
    program = gradients_lowered(objective, apart, work.method.rule, work.batch())
    return program.cost_analysis()["flops"]


def gathered_bytes(work: Work, place: Placed) -> float:
    """Parameters that other devices hold, once a pass, and the gradients that are added up between
    them: each device sends and receives the parts that are not its own."""
    away = state_bytes(place.params) - local_bytes(place.params)
    between = state_bytes(place.trainable) - local_bytes(place.trainable)
    return work.method.passes * away + between
