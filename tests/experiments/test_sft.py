"""What the fine-tuning experiments share: the split, measures of a tiny model, what is remembered."""

import jax
import numpy as np
import pytest

from experiments import sft_smollm2
from experiments.shared import sft, small_lm
from research import hub
from research.data import packing, supervised
from research.models import decoder
from research.models.families.llama import llama
from research.runs import override, results
from research.runs.canonical import run_id
from research.runs.environment import ROOT

TEXTS = ["to be or not to be, that is the question", "春天来了，花开了。", "a b c a b c"]


@pytest.fixture(scope="module")
def tiny():
    tokenizer = small_lm.bpe(TEXTS, 300)
    model = decoder.Decoder(llama(tokenizer.vocab_size, 1, 8, 2, 2, 16, tied=True))
    return hub.Pretrained(model, decoder.init(model, jax.random.key(0)), tokenizer, {})


def encode(tokenizer, messages):
    """The question, then the answer and its end, which are learned."""
    question, answer = (tokenizer.encode(m["content"]) for m in messages)
    mask = [0] * len(question) + [1] * (len(answer) + 1)
    return np.array([*question, *answer, tokenizer.eos_id]), np.array(mask)


def conversation(question, answer):
    return "row", [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_the_split_is_whole_mixed_and_always_the_same():
    train, held_out = sft.split(list(range(100)), 30)
    assert len(held_out) == 30 and sorted(train + held_out) == list(range(100))
    assert held_out != sorted(held_out) and sft.split(list(range(100)), 30) == (train, held_out)
    assert sft.split(list(range(100)), 10)[1] == held_out[:10]


def test_nothing_is_trained_on_that_is_held_out_under_a_key():
    train, held_out = sft.split(list(range(100)), 10, key=lambda item: item % 50)
    assert held_out == sft.split(list(range(100)), 10)[1]
    assert len(train) == 100 - len({item % 50 for item in held_out}) * 2
    assert not {item % 50 for item in held_out} & {item % 50 for item in train}


def test_likelihood_is_of_the_answers_their_ends_and_their_bytes(tiny):
    rows = [conversation(TEXTS[0], TEXTS[1]), conversation(TEXTS[1], TEXTS[2])]
    table = sft.packed(rows, lambda m: encode(tiny.tokenizer, m), 64)
    found = sft.likelihood(tiny, table, rows=2)
    assert found.bytes == len((TEXTS[1] + TEXTS[2]).encode())
    assert found.tokens == sum(len(tiny.tokenizer.encode(t)) + 1 for t in TEXTS[1:])
    by_hand = 0.0
    for _, messages in rows:
        ids, mask = encode(tiny.tokenizer, messages)
        log_probs = jax.nn.log_softmax(tiny.logits(ids[:-1].tolist())[0])
        picked = log_probs[np.arange(len(ids) - 1), ids[1:]]
        by_hand -= float(np.sum(picked * mask[1:]))
    assert found.nll == pytest.approx(by_hand, rel=1e-5)


def test_packed_cuts_what_is_too_long(tiny):
    rows = [conversation(TEXTS[2], TEXTS[0])]
    whole = len(encode(tiny.tokenizer, rows[0][1])[0])
    table = sft.packed(rows, lambda m: encode(tiny.tokenizer, m), whole - 3)
    assert table["tokens"].shape == (1, whole - 3) and (table["segment_ids"] == 1).all()


def test_tuning_with_lora_learns_and_leaves_the_rest(tiny, tmp_path):
    rows = [conversation(TEXTS[0], TEXTS[1])]
    table = sft.packed(rows, lambda m: encode(tiny.tokenizer, m), 64)
    params, rule = sft.with_lora(tiny.params, sft.LINEAR, 4, 8.0, seed=0)
    config = sft_smollm2.Config(lr=3e-2, warmup_steps=1, steps=20, batch_size=1)
    seen = []

    def evaluate(pretrained):
        seen.append(sft.likelihood(pretrained, table, 1).per_token)
        return {"nll": seen[-1]}

    tuned = sft.tune(tiny, params, rule, table, config, tmp_path, eval_every=10, evaluate=evaluate)
    before = sft.likelihood(tiny, table, 1).per_token
    assert sft.likelihood(tuned, table, 1).per_token == seen[-1] < seen[0] < before - 0.01
    np.testing.assert_array_equal(tuned.params["embed"]["table"], tiny.params["embed"]["table"])


def test_greedy_answers_end_at_the_limit_or_the_stop(tiny):
    ids = tiny.tokenizer.encode(TEXTS[0])
    (said,) = sft.greedy(tiny, [ids], 3)
    row = list(ids)
    for _ in range(3):
        row.append(int(tiny.logits(row)[0, -1].argmax()))
        if row[-1] in tiny.tokenizer.stop_ids:
            break
    assert said == tiny.tokenizer.decode(row[len(ids) :])


def test_once_makes_a_thing_once(tmp_path):
    calls = []
    make = lambda: calls.append(0) or {"答": len(calls)}  # noqa: E731
    assert sft.once(tmp_path / "x.json", make) == {"答": 1} == sft.once(tmp_path / "x.json", make)
    assert len(calls) == 1 and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_runs_that_are_committed_are_still_those_of_sft_smollm2():
    rows = results.read(ROOT / "experiments/results/sft_smollm2.jsonl")
    ids = {run_id("sft_smollm2", override(sft_smollm2.BASE, p)) for p in sft_smollm2.SWEEP}
    assert {row["id"] for row in rows} == ids and len(ids) == 2


def test_unpacking_is_what_bytes_are_counted_on():
    example = supervised.shift([1, 2, 3, 4], [0, 0, 1, 1])
    (found,) = packing.unpack(packing.pack([example], 6))
    assert found.targets[found.weights != 0].tolist() == [3, 4]
