"""SmolLM2-135M-Instruct from its GGUF file: the numbers of transformers, and of the Bible."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_reference import FIXTURES, ask, needs_reference

from research import hub
from research.decode import Sampling, generate
from research.hub.download import smollm2
from research.models.decoder import empty_cache

pytestmark = pytest.mark.weights

RECORD = json.loads((FIXTURES / "smollm2.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in RECORD["cases"]}
GENESIS = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and "
    "void; and darkness was upon the face of the deep."
)


@pytest.fixture(scope="module")
def loaded():
    return hub.load(smollm2())


@pytest.fixture(scope="module")
def logits(loaded):
    """{name: [T, V]} in one padded batch: a causal model does not see what follows."""
    length = max(len(case["ids"]) for case in CASES.values())
    rows = [case["ids"] + [0] * (length - len(case["ids"])) for case in CASES.values()]
    found = np.asarray(loaded.logits(rows))
    return {c["name"]: found[i, : len(c["ids"])] for i, c in enumerate(CASES.values())}


def nll(model, params, ids):
    logits = model.apply({"params": params}, jnp.asarray([ids]))[0, :-1]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(ids)[1:, None], -1).mean()


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_recorded_from_transformers(logits, name):
    ours, case = logits[name], CASES[name]
    np.testing.assert_allclose(ours[:, RECORD["vocabulary"]], case["logits"], rtol=0, atol=2e-3)
    np.testing.assert_allclose(
        jax.nn.logsumexp(ours, axis=-1), case["log_sum_exp"], rtol=0, atol=2e-3
    )


@pytest.mark.reference
@needs_reference
def test_logits_equal_transformers_own_loading(logits, tmp_path):
    names = ["english", "code", "chinese"]
    prompts = [CASES[name]["ids"] for name in names]
    (theirs,) = ask(tmp_path, {"model": smollm2(), "prompts": prompts})
    for number, name in enumerate(names):
        np.testing.assert_allclose(logits[name], theirs[f"logits.{number}"], rtol=0, atol=2e-3)


def test_64_greedy_tokens_equal_transformers(loaded):
    """All four prompts in one batch, padded on the left, continued token by token with a cache."""
    length = max(len(case["ids"]) for case in CASES.values())
    pads = [length - len(case["ids"]) for case in CASES.values()]
    rows = [[0] * pad + case["ids"] for pad, case in zip(pads, CASES.values(), strict=True)]
    segments = [[0] * pad + [1] * (length - pad) for pad in pads]

    @jax.jit
    def step(params, tokens, segment_ids, cache):
        logits, cache = loaded.model.apply(
            {"params": params}, tokens, segment_ids=segment_ids, cache=cache
        )
        return logits[:, -1:].argmax(-1).astype(jnp.int32), cache

    cache = empty_cache(loaded.model, len(rows), length + 64)
    tokens, cache = step(
        loaded.params, jnp.asarray(rows, jnp.int32), jnp.asarray(segments, jnp.int32), cache
    )
    found = [tokens]
    for _ in range(63):
        tokens, cache = step(loaded.params, tokens, jnp.ones_like(tokens), cache)
        found.append(tokens)
    found = np.concatenate(found, axis=1).tolist()
    assert found == [case["greedy"] for case in CASES.values()]


def test_generate_on_ragged_prompts_gives_the_same_64_tokens(loaded):
    prompts = [case["ids"] for case in CASES.values()]
    assert len({len(prompt) for prompt in prompts}) > 1
    found = generate(
        loaded.model, loaded.params, prompts, jax.random.key(0), Sampling(0.0, max_tokens=64)
    )
    assert found.rows() == [case["greedy"] for case in CASES.values()]


def test_nll_of_genesis(loaded):
    ids = loaded.tokenizer.encode(GENESIS)
    assert len(ids) == 31
    assert nll(loaded.model, loaded.params, ids) == pytest.approx(2.598, abs=0.005)


def test_rows_left_in_llama_cpp_order_are_worse_by_a_known_number(loaded):
    """What the loss would be had q and k not been un-permuted."""

    def interleave(kernel):
        *rest, columns = kernel.shape
        halves = kernel.reshape(*rest, columns // 64, 2, 32)
        return halves.swapaxes(-1, -2).reshape(kernel.shape)

    block = loaded.params["stack_0"]["block_0"]
    attention = {
        name: {"kernel": interleave(node["kernel"])} if name in ("q", "k") else node
        for name, node in block["attention"].items()
    }
    wrong = loaded.params | {"stack_0": {"block_0": block | {"attention": attention}}}
    ids = loaded.tokenizer.encode(GENESIS)
    assert nll(loaded.model, wrong, ids) == pytest.approx(3.368, abs=0.005)


@pytest.mark.parametrize("name", CASES)
def test_tokenizer(loaded, name):
    case = CASES[name]
    assert loaded.tokenizer.encode(case["text"]) == case["ids"]
    assert loaded.tokenizer.decode(case["ids"], skip_special=False) == case["text"]
    if "reference_ids" in case:
        assert case["reference_ids"] == case["ids"]


def test_digits_stand_alone_and_special_tokens_are_known(loaded):
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode("in 1789, 25")
    assert [tokenizer.id_to_token(i) for i in ids] == ["in", "Ġ", *"1789", ",", "Ġ", "2", "5"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (1, 2, 2, 0)
    assert tokenizer.encode("<|im_start|>x<|im_end|>", add_special=True)[::2] == [1, 2]
    assert "helpful AI assistant named SmolLM" in tokenizer.chat_template


def test_translated_config(loaded):
    assert {name: loaded.config[name] for name in ("hidden_size", "num_key_value_heads")} == {
        "hidden_size": 576,
        "num_key_value_heads": 3,
    }
    assert loaded.config["rms_norm_eps"] == 1e-5
    assert loaded.config["rope_parameters"] == {"rope_theta": 100_000.0, "rope_type": "default"}
    assert loaded.config["tie_word_embeddings"] is True
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded.params)) == 134_515_008
