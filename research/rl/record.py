"""A rollout is data: what a policy was asked, what it did, what it got for it, in one record.

Rows are prompts with their answers, shifted by one as all training rows are: at position t the model has
read tokens[:t+1] and chose targets[t]. `mask` is 1 where that choice was the policy's own; the prompt and
what an environment said in between have 0. Values stand where the choice was made: V before the token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from safetensors.numpy import load_file, save_file

from research.losses.advantages import masked_mean
from research.losses.policy import explained_variance
from research.types import Array

Ids = Sequence[int]


@struct.dataclass
class Rollout:
    """Of B answers in rows of T. Log-probabilities are those of the distribution that was sampled from,
    with its temperature; nats.

    tokens, targets, segment_ids   [B, T] int32; segment 0 is padding
    mask          [B, T] float32, 1 where the target is the policy's choice
    log_probs     [B, T] of the targets, by the policy that sampled, computed as in training
    sampled       [B, T] what the sampler said of them when it drew, without temperature
    reference     [B, T] by the reference policy
    values        [B, T] by the critic, 0 without one
    scores        [B]    of whole answers, before any penalty
    ended         [B]    1 where the answer came to its end by itself
    rewards, advantages, returns   [B, T]
    """

    tokens: Array
    targets: Array
    segment_ids: Array
    mask: Array
    log_probs: Array
    sampled: Array
    reference: Array
    values: Array
    scores: Array
    ended: Array
    rewards: Array
    advantages: Array
    returns: Array

    def rows(self, items: Any) -> Rollout:
        """Some of the answers."""
        return Rollout(**{name: value[items] for name, value in vars(self).items()})


STATISTICS = (
    *("score", "score_deviation", "length", "ended", "kl", "log_prob"),
    "explained_variance",
)
PER_ANSWER = ("scores", "ended")
WHOLE = ("tokens", "targets", "segment_ids")


def empty(rows: int, length: int) -> Rollout:
    """All 0: what a source's state holds before the first rollout."""

    def zeros(name: str) -> np.ndarray:
        shape = (rows,) if name in PER_ANSWER else (rows, length)
        return np.zeros(shape, np.int32 if name in WHOLE else np.float32)

    return Rollout(**{name: zeros(name) for name in Rollout.__dataclass_fields__})


def lay_out(
    rows: Sequence[tuple[Ids, Ids]], length: int, sampled: Sequence[Sequence[float]]
) -> dict[str, np.ndarray]:
    """tokens, targets, segment_ids, mask and sampled [B, length] of rows (ids, chosen): chosen[i] is 1
    where ids[i] is the policy's choice. ValueError for a row that is longer, or that begins with a choice."""
    B = len(rows)
    found = {name: np.zeros((B, length), np.int32) for name in WHOLE}
    found |= {name: np.zeros((B, length), np.float32) for name in ("mask", "sampled")}
    for row, (ids, chosen) in enumerate(rows):
        n = len(ids) - 1
        if n < 0 or chosen[0]:
            raise ValueError(f"row {row} begins with no token of a prompt")
        if n > length:
            raise ValueError(f"row {row} has {n + 1} tokens, more than the {length + 1} of a row")
        found["tokens"][row, :n], found["targets"][row, :n] = ids[:-1], ids[1:]
        found["segment_ids"][row, :n], found["mask"][row, :n] = 1, chosen[1:]
        found["sampled"][row, :n][np.asarray(chosen[1:]) == 1] = sampled[row]
    return found


def statistics(rollout: Rollout) -> dict[str, float]:
    """What people look at: mean and spread of scores, length of answers, share that ended, KL from the
    reference an answer (k1), explained variance of the critic."""
    return {name: float(value) for name, value in jax.device_get(_statistics(rollout)).items()}


@jax.jit
def _statistics(rollout: Rollout) -> dict[str, Array]:
    mask = rollout.mask
    kl = jnp.where(mask != 0, rollout.log_probs - rollout.reference, 0)
    return {
        "score": rollout.scores.mean(),
        "score_deviation": rollout.scores.std(),
        "length": mask.sum(1).mean(),
        "ended": rollout.ended.mean(),
        "kl": kl.sum(1).mean(),
        "log_prob": masked_mean(rollout.log_probs, mask),
        "explained_variance": explained_variance(rollout.values, rollout.returns, mask),
    }


def save(rollout: Rollout, path: Path | str) -> None:
    """As safetensors."""
    arrays = {name: np.ascontiguousarray(value) for name, value in vars(rollout).items()}
    save_file(arrays, str(path))


def load(path: Path | str) -> Rollout:
    """What `save` wrote; ValueError naming what the file lacks or should not have."""
    arrays = load_file(str(path))
    wanted = set(Rollout.__dataclass_fields__)
    if wrong := wanted ^ set(arrays):
        raise ValueError(f"{path} is no rollout: {', '.join(sorted(wrong))} missing or unknown")
    return Rollout(**arrays)


def samples(
    rollout: Rollout, decode: Callable[[list[int]], str], count: int
) -> list[dict[str, Any]]:
    """The first answers as text: {prompt, answer, score, kl}."""
    found = []
    for i in range(min(count, len(rollout.scores))):
        real, chosen = rollout.segment_ids[i] != 0, rollout.mask[i] != 0
        first = int(np.argmax(chosen)) if chosen.any() else int(real.sum())
        ids = [int(rollout.tokens[i, 0]), *rollout.targets[i][real].tolist()]
        kl = float((rollout.log_probs[i] - rollout.reference[i])[chosen].sum())
        found.append(
            {
                "prompt": decode(ids[: first + 1]),
                "answer": decode(ids[first + 1 :]),
                "score": float(rollout.scores[i]),
                "kl": kl,
            }
        )
    return found
