"""What is measured, and what the machine would allow: plain data, read by both interpreters.

A repetition of a mode is some `work` (tokens of the unit that is reported). Its least time is the
larger of its arithmetic at the speed of a large matrix product and its traffic at the speed of
memory. Only products with the model's matrices are counted, attention and norms are not, so the
limit is a little above what can be reached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# SmolLM2-135M: 30 layers of q, o [576, 576], k, v [576, 192], gate, up, down [576, 1536].
TRUNK = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
HEAD = 49152 * 576
RANK = 16
FACTORS = 30 * RANK * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))

FULL = {
    "prompt": 16,
    "new_tokens": 64,
    "prefill": 1024,
    "rows": 4,
    "length": 256,
    "batches": (5, 13, 21, 29),  # of the data set in order, 8 rows each
    "packed_length": 512,
    "packed_rows": 3,
}
QUICK = {
    **FULL,
    "new_tokens": 8,
    "prefill": 128,
    "rows": 2,
    "length": 64,
    "batches": (5,),
}

Reply = dict[str, Any]  # one repetition, see `worker`


@dataclass(frozen=True)
class Mode:
    """flops and bytes of one repetition, given what a worker replied about it.

    unit      what `work` counts
    wanted    ratio to the reference that was aimed at
    """

    title: str
    unit: str
    wanted: float
    flops: Callable[[Reply], float]
    bytes: Callable[[Reply], float] = lambda reply: 0.0


def weights_read(reply: Reply) -> float:
    """Every matrix is read once a token (of the whole batch), float32."""
    return 4.0 * (TRUNK + HEAD) * reply["steps"]


def lora_flops(reply: Reply) -> float:
    """Forward and the gradient of activations; of the factors, their own gradient too. The head
    is needed where there is loss only."""
    return (4.0 * TRUNK + 6 * FACTORS) * reply["tokens"] + 4.0 * HEAD * reply["supervised"]


MODES = {
    "decode1": Mode(
        "decode, batch 1",
        "tokens",
        1.4,
        lambda reply: 2.0 * (TRUNK + HEAD) * reply["work"],
        weights_read,
    ),
    "decode8": Mode(
        "decode, batch 8",
        "tokens",
        1.5,
        lambda reply: 2.0 * (TRUNK + HEAD) * reply["work"],
        weights_read,
    ),
    "prefill1024": Mode(
        "prefill, 1024 tokens",
        "tokens",
        0.95,
        lambda reply: 2.0 * TRUNK * reply["work"] + 2.0 * HEAD,
    ),
    "full4x256": Mode(
        "full step, 4×256",
        "tokens",
        0.95,
        lambda reply: 6.0 * (TRUNK * reply["tokens"] + HEAD * reply["supervised"]),
    ),
    "lora4x256": Mode("LoRA step, r = 16, 4×256", "tokens", 1.05, lora_flops),
    "rows": Mode("LoRA on instruction rows", "supervised tokens", 1.5, lora_flops),
}


def limit_s(mode: Mode, reply: Reply, limits: dict[str, float]) -> float:
    """The least seconds of a repetition on a machine of those `limits` (see `limits.measure`)."""
    compute = mode.flops(reply) / (limits["matmul_gflop_s"] * 1e9)
    return max(compute, mode.bytes(reply) / (limits["read_gb_s"] * 1e9))
