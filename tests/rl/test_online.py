"""Pairs of the policy's own answers: who is preferred, what weighs nothing, and that it learns."""

import dataclasses

import jax
import numpy as np
import pytest
from small_policy import MODEL, TASK, start

from research.losses.preference import dpo
from research.objectives import answer_log_probs, preference
from research.objectives.reference import in_context
from research.rl.online import Judged, judged_source
from research.train.loop import Training, fit
from research.train.optim import AdamW

SETTINGS = Judged(prompts=6, answers=3, minibatch=3, refresh=4)
LIKES_LOW = TASK._replace(score=lambda ts: np.array([-np.mean(t.ids) for t in ts]))


def batches(task, settings=SETTINGS, count=1):
    made, params = judged_source(MODEL, task, settings), start(critic=False)
    state, found = made.init(jax.random.key(0)), []
    for step in range(count):
        batch, state = made.next(state, params, None, jax.random.key(step), {})
        found.append(batch)
    return found, state


def mean_of(batch, segment):
    inside = (batch["segment_ids"] == segment) & (batch["weights"] != 0)
    return np.array([t[i].mean() for t, i in zip(batch["targets"], inside, strict=True)])


def test_the_better_answer_stands_first():
    (batch,), _ = batches(LIKES_LOW)
    real = batch["pair_weights"] > 0
    assert real.any() and (mean_of(batch, 1) < mean_of(batch, 2))[real].all()
    assert batch["pair_weights"].sum() == pytest.approx(1)


def test_answers_that_are_equally_good_weigh_nothing():
    (batch,), _ = batches(TASK._replace(score=lambda ts: np.zeros(len(ts))))
    assert not batch["pair_weights"].any()


def test_with_a_bonus_the_rarer_of_them_is_preferred():
    settings = dataclasses.replace(SETTINGS, bonus=0.1)
    (batch,), _ = batches(TASK._replace(score=lambda ts: np.zeros(len(ts))), settings)
    assert (batch["pair_weights"] > 0).all()
    sums, _ = answer_log_probs(MODEL, start(critic=False), batch)
    assert (sums[:, 0] < sums[:, 1]).all()


def test_pairs_stay_until_they_are_refreshed():
    found, _ = batches(LIKES_LOW, count=5)
    tokens = [np.sort(b["tokens"].sum(1)) for b in found]
    first, second = np.concatenate(tokens[:2]), np.concatenate(tokens[2:4])
    np.testing.assert_array_equal(np.sort(first), np.sort(second))
    assert found[4]["rollout/score"] != found[3]["rollout/score"]


def test_online_dpo_raises_the_judges_score():
    scores, settings = [], Judged(prompts=32, minibatch=32, refresh=1)
    task = LIKES_LOW._replace(score=lambda ts: scores.append(x := LIKES_LOW.score(ts)) or x)
    params = start(critic=False)
    fit(
        preference(MODEL, dpo, reference=in_context()),
        judged_source(MODEL, task, settings),
        params,
        AdamW(1e-2, weight_decay=0.0),
        Training(15, log_every=None),
        context={"reference": params},
    )
    assert scores[-1].mean() > scores[0].mean() + 2


def test_what_is_refused():
    with pytest.raises(ValueError, match="2 answers"):
        Judged(answers=1)
    with pytest.raises(ValueError, match="do not split into"):
        Judged(prompts=2, minibatch=3)
    with pytest.raises(ValueError, match="refresh must be at least 1"):
        Judged(refresh=0)
