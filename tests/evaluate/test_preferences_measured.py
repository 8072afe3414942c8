"""Rows of pairs through a model, and sources of them."""

import jax
import numpy as np
import pytest

from research.data.preferences import ExamplePair, pair_rows
from research.data.source import pair_source
from research.data.supervised import shift
from research.evaluate.preferences import answered, margins
from research.models import decoder
from research.models.families.llama import llama
from research.objectives import answer_log_probs

MODEL = decoder.Decoder(llama(40, 1, 16, 2, 1, 32, head_size=8, tied=True, init_std=0.4))


@pytest.fixture(scope="module")
def params():
    return jax.jit(decoder.init, static_argnums=0)(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def table():
    random = np.random.default_rng(0)

    def example(prompt):
        ids = np.concatenate([prompt, random.integers(0, 40, random.integers(2, 6))])
        return shift(ids, np.arange(len(ids)) >= len(prompt))

    prompts = [random.integers(0, 40, n) for n in (3, 5, 2, 4, 3)]
    return pair_rows([ExamplePair(example(p), example(p)) for p in prompts], 24)


def test_batches_of_rows_do_not_matter(params, table):
    whole, _ = answer_log_probs(MODEL, params, table)
    for rows in (1, 3, 5):
        found = answered(MODEL, params, table, rows)
        np.testing.assert_allclose(found.log_probs, whole, atol=1e-5)
        assert found.tokens.shape == (5, 2)
    assert found.accuracy == np.mean(whole[:, 0] > whole[:, 1])
    assert not margins(found, found).any()


def test_a_source_gives_pairs_with_what_belongs_to_them(table):
    reference = np.arange(10.0, dtype=np.float32).reshape(5, 2)
    source = pair_source(table | {"reference": reference}, 2, seed=3)
    state, seen = source.init(None), []
    for _ in range(5):
        batch, state = source.next(state)
        assert batch["pair_weights"].tolist() == [0.5, 0.5]
        for row, tokens in zip(batch["reference"], batch["tokens"], strict=True):
            index = int(row[0]) // 2
            np.testing.assert_array_equal(tokens, table["tokens"][index])
            seen.append(index)
    assert sorted(seen) == sorted([*range(5)] * 2)  # two epochs
    with pytest.raises(ValueError, match="the table has no pairs"):
        pair_source({"tokens": np.zeros((0, 4))}, 2, 0)
