"""How fast a model writes, for experiments that compare decoders."""

from __future__ import annotations

import statistics
import time

import jax

from experiments.shared.small_lm import Data
from research.decode.generate import for_decoding, generate
from research.decode.sampling import Sampling
from research.models.decoder import Decoder
from research.types import Params


def decoding_speed(
    model: Decoder, params: Params, data: Data, prompt: int, answer: int, calls: int = 1
) -> float:
    """Tokens a second of one row, greedy, the prompt's reading included.

    The first `prompt` held-out tokens are continued by `answer`. The median of `calls`, after one
    more that compiles.
    """
    params, sampling = for_decoding(params), Sampling(0.0, max_tokens=answer)
    prompts, speeds = [data.held_out[:prompt].tolist()], []
    for _ in range(1 + calls):
        started = time.perf_counter()
        said = generate(model, params, prompts, jax.random.key(0), sampling)
        speeds.append(float(said.lengths.sum()) / (time.perf_counter() - started))
    return statistics.median(speeds[1:])
