"""What the reward model's experiments are made of: cut prompts, equal scores both ways, made-up rows."""

import jax
import numpy as np
import pytest
from made_up import rows

from experiments import overoptimization, reward_model
from experiments.shared import reward_training
from experiments.shared.reward_training import HEAD, Recipe
from research.data.preferences import Preference
from research.evaluate.reward_models import pair_scores
from research.hub.pretrained import Pretrained
from research.models import decoder
from research.models.families.llama import llama


def encode(messages):
    """A token a character; the last turn is learned."""
    texts = [message["content"] for message in messages]
    ids = [ord(c) % 40 for c in "".join(texts)]
    return np.array(ids), np.arange(len(ids)) >= len(ids) - len(texts[-1])


@pytest.fixture(scope="module")
def base():
    model = decoder.Decoder(llama(40, 1, 16, 2, 1, 32, head_size=8, tied=True, init_std=0.4))
    return Pretrained(
        model, jax.jit(decoder.init, static_argnums=0)(model, jax.random.key(0)), None, {}
    )


def test_a_long_prompt_keeps_its_end():
    turns = [{"role": "user", "content": "abcdef"}, {"role": "assistant", "content": "xy"}]
    ids, mask = reward_training.recent(encode, 2)(turns)
    assert ids.tolist() == [ord(c) % 40 for c in "efxy"] and mask.tolist() == [0, 0, 1, 1]
    for enough in (6, 9):
        ids, mask = reward_training.recent(encode, enough)(turns)
        np.testing.assert_array_equal(ids, encode(turns)[0])
        np.testing.assert_array_equal(mask, encode(turns)[1])


def test_a_trained_model_scores_texts_as_it_scores_rows(base, tmp_path):
    cut = reward_training.recent(encode, 3)
    asked = [{"role": "user", "content": "which?"}]
    pairs = [
        ("a", Preference(asked, "good", "bad")),
        ("b", Preference(asked, "better", "worst of")),
    ]
    table = reward_training.rows(pairs, cut, 10)
    recipe = Recipe(lr=0.05, warmup_steps=1, steps=20, batch_size=2, rank=2)
    params = reward_training.trained(base, table, recipe, 0, tmp_path)
    scores = pair_scores(base.model, HEAD, params, table)
    assert (scores[:, 0] > scores[:, 1] + 0.5).all()
    np.testing.assert_array_equal(params["embed"]["table"], base.params["embed"]["table"])
    reward = reward_training.as_reward(base, params, cut, 10)
    found = reward(["which?"] * 4, ["good", "bad", "better", "worst of"])
    np.testing.assert_allclose(found, scores.ravel(), rtol=1e-4, atol=1e-5)


def test_no_temperature_is_told_where_there_is_none():
    characters = np.array([[3, 5], [9, 2], [4, 4]])
    found = reward_model.measured(np.array([[1.0, 0.0], [0.5, 0.0], [0.2, 0.3]]), characters)
    assert found["accuracy"] == pytest.approx(2 / 3) and found["temperature"] > 0
    found = reward_model.measured(np.array([[1.0, 0.0], [0.5, 0.0], [0.3, 0.2]]), characters)
    assert found["accuracy"] == 1 and "temperature" not in found


def test_scores_within_prompts():
    scores = overoptimization.centred(np.array([[1.0, 3.0], [10.0, 20.0]]))
    np.testing.assert_allclose(scores.mean(-1), 0)
    assert np.square(scores).mean() == pytest.approx(1) and scores[1, 1] == 5 * scores[0, 1]


def test_table_and_figure_of_reward_models():
    characters = np.arange(12).reshape(6, 2)

    def metrics(config):
        scores = np.random.default_rng(config.seed).normal(size=(6, 2))
        more = {"train/accuracy": 0.9, "longer/held_out": 0.4, "longer/train": 0.45}
        return reward_model.measured(scores, characters) | more

    made = rows(reward_model, metrics)
    lines = reward_model.table(made).splitlines()
    shown = [tuple(line.strip("| ").split(" | ")[:2]) for line in lines[2:7]]
    assert shown == [(str(n), "all tokens") for n in (30, 60, 120, 240)] + [("240", "the last")]
    assert "0.400 of the held-out pairs, 0.450 of the others" in lines[-1]
    assert len(reward_model.figure(made).axes[0].lines) == 2 * (1 + 4) + 2


def test_table_and_figure_of_overoptimization():
    def metrics(config):
        kinds = ("kl", "proxy", "gold", "error", "best")
        found = {f"{kind}/{n}": np.log(n) for n in overoptimization.NUMBERS for kind in kinds}
        return found | {"agreement": config.pairs / 1000}

    made = rows(overoptimization, metrics)
    lines = overoptimization.table(made).splitlines()
    shown = [tuple(line.strip("| ").split(" | ")[:2]) for line in lines[2:6]]
    assert shown == [("16", "one"), ("64", "one"), ("64", "three"), ("256", "one")]
    assert lines[2].endswith("| 0.016 |")
    assert len(overoptimization.figure(made).axes[0].lines) == 3 * 2 + 1 + 1
