"""A tiny model and rows of its tokens that say what pairs and single answers say."""

import jax
import numpy as np

from research.data.judged import JudgedExample, answer_rows
from research.data.preferences import ExamplePair, pair_rows
from research.data.supervised import shift
from research.models import decoder
from research.models.families.llama import llama

V = 40
INIT = jax.jit(decoder.init, static_argnums=0)


def model(vocab_size=V):
    return decoder.Decoder(llama(vocab_size, 1, 16, 2, 1, 32, head_size=8, tied=True, init_std=0.4))


MODEL = model()


def example(random, prompt):
    ids = np.concatenate([prompt, random.integers(0, V, random.integers(2, 6))])
    return shift(ids, np.arange(len(ids)) >= len(prompt))


def pairs(count=3):
    """A batch of pairs, each of the same weight."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, V, n % 4 + 2) for n in range(count)]
    rows = pair_rows([ExamplePair(example(random, p), example(random, p)) for p in prompts], 24)
    return rows | {"pair_weights": np.full(count, 1 / count, np.float32)}


def answers(good=(True, False, True)):
    """A batch of single answers, each of the same weight."""
    random = np.random.default_rng(1)
    prompts = [random.integers(0, V, n % 4 + 2) for n in range(len(good))]
    both = [(example(random, p), example(random, p)) for p in prompts]
    rows = [JudgedExample(*two, label) for two, label in zip(both, good, strict=True)]
    weights = np.full(len(good), 1 / len(good), np.float32)
    return answer_rows(rows, 24) | {"answer_weights": weights}
