"""Decoding from matrices of few bits: made dense once or unpacked in every call, the same."""

import jax
import numpy as np
import pytest

from research.decode import Sampling, generate
from research.decode.generate import for_decoding
from research.models import decoder
from research.models.families.llama import llama
from research.weights import int8, lora, merge
from research.weights.base import is_weight
from research.weights.formats import Codebook, Integer
from research.weights.quantized import is_quantized, quantize
from research.weights.transposed import Transposed

MODEL = decoder.Decoder(llama(40, 2, 16, 4, 2, 32, tied=True, init_std=0.3))
PROMPTS = [[5, 9, 2], [7]]


@pytest.fixture(scope="module")
def params():
    return jax.jit(decoder.init, static_argnums=0)(MODEL, jax.random.key(1))


def nodes(params):
    return [w for w in jax.tree.leaves(params, is_leaf=is_weight) if is_weight(w)]


def test_made_dense_once_it_says_what_it_says_unpacked_in_every_call(params):
    few = quantize(params, r".*(kernel|table)", Codebook(group=16))
    sampling = Sampling(temperature=0, max_tokens=8)
    once, kept = for_decoding(few), for_decoding(few, dense=False)
    assert all(isinstance(w, Transposed) for w in nodes(once)) and not is_weight(
        once["embed"]["table"]
    )
    assert all(map(is_quantized, nodes(kept))) and len(nodes(kept)) == 2 * 7 + 1
    plain, *others = (
        generate(MODEL, form, PROMPTS, jax.random.key(0), sampling)
        for form in (merge(few), once, kept)
    )
    for other in others:
        np.testing.assert_array_equal(other.tokens, plain.tokens)
        np.testing.assert_allclose(other.log_probs, plain.log_probs, atol=1e-4)


def test_an_adapter_stays_and_what_rounds_inputs_keeps_its_integers(params):
    few = quantize(params, r".*/(q|down)/kernel", Integer(8, "row"))
    few = int8.add(few, r".*/down/kernel")
    few = lora.add(few, r".*/q/kernel", jax.random.key(2), rank=2)
    block = for_decoding(few)["stack_0"][1]["block_0"]
    assert isinstance(block["attention"]["q"]["kernel"], lora.LoRA)
    assert isinstance(block["attention"]["q"]["kernel"].base, Transposed)
    assert is_quantized(block["ffn"]["down"]["kernel"].base)


def test_a_table_below_an_adapter_is_made_dense_too(params):
    few = lora.add(
        quantize(params, "embed/table", Codebook(group=16)),
        "embed/table",
        jax.random.key(2),
        rank=2,
    )
    table = for_decoding(few)["embed"]["table"]
    assert isinstance(table, lora.LoRA) and not is_weight(table.base)
