"""Rollouts: what is recorded, that the ratio begins at 1, masks, files, bad rewards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from small_policy import MODEL, SETTINGS, TASK, first, start

from research.decode.generate import for_decoding, prefill
from research.decode.sampling import Filters, Sampling, filtered, log_prob
from research.losses.advantages import kl_estimate
from research.rl import record, tasks
from research.rl.advantage import Estimator
from research.rl.objective import Loss, policy_gradient
from research.rl.play import Clock, play, scored
from research.rl.policy import said, scorer, with_critic, without_critic
from research.rl.record import Rollout
from research.rl.source import Rollouts, rollout_source


@pytest.fixture(scope="module")
def made():
    return first()


def rollout(made):
    return Rollout(**made[3]["rollout"])


def test_the_first_minibatch_has_ratio_1(made):
    params, context, batch, _ = made
    _, metrics = jax.jit(policy_gradient(MODEL, Loss()))(params, context, batch, None)
    assert float(metrics["ratio"].value) == 1.0
    assert float(metrics["clip_fraction"].value) == 0.0
    assert float(metrics["approximate_kl"].value) == 0.0
    assert float(metrics["ratio/0.9 to 1.1"].value) == 1.0


def test_another_temperature_is_found_out(made):
    params, context, batch, _ = made
    other = batch | {"temperature": np.float32(1.0)}
    _, metrics = jax.jit(policy_gradient(MODEL, Loss()))(params, context, other, None)
    assert abs(float(metrics["ratio"].value) - 1) > 1e-3


def test_the_samplers_own_log_probabilities(made):
    params, _, _, state = made
    rows = Rollout(**state["rollout"])
    read = {name: getattr(rows, name) for name in (*record.WHOLE, "mask")}
    again = scorer(MODEL)(params, read | {"temperature": np.float32(1.0)})
    np.testing.assert_allclose(again.log_probs, rows.sampled, atol=1e-5)


def test_what_the_sampler_drew_from_at_its_temperature(made):
    rows, drawn = rollout(made), Filters(temperature=0.7)
    params = for_decoding(without_critic(made[0]))
    for place in np.flatnonzero(rows.mask.any(0)):
        until, real = rows.tokens[:, : place + 1], rows.mask[:, place] > 0
        logits, _ = prefill(MODEL, params, until, np.ones_like(until), place + 2)
        found = log_prob(filtered(logits, drawn), rows.targets[:, place])
        np.testing.assert_allclose(rows.log_probs[real, place], found[real], atol=1e-5)


def test_padding_and_prompts_have_nothing(made):
    rows = rollout(made)
    outside = rows.mask == 0
    for name in ("log_probs", "sampled", "reference", "values", "rewards", "advantages", "returns"):
        assert not np.any(getattr(rows, name)[outside]), name
    assert (rows.mask.sum(1) >= 1).all()


def test_rewards_are_the_score_at_the_end_less_the_kl(made):
    rows = rollout(made)
    wanted = -0.1 * (rows.log_probs - rows.reference)
    for i, n in enumerate(rows.mask):
        wanted[i, np.flatnonzero(n)[-1]] += rows.scores[i]
    np.testing.assert_allclose(rows.rewards, np.where(rows.mask, wanted, 0), atol=1e-6)


def test_scores_are_those_of_the_rows(made):
    rows = rollout(made)
    for i in range(len(rows.scores)):
        ids = rows.targets[i][rows.mask[i] == 1].tolist()
        ended = ids[-1] == tasks.END
        prompt = [int(rows.tokens[i, 0]), *rows.targets[i][: 2 + 1].tolist()]
        t = tasks.Transcript(prompt, ids, [1] * len(ids), ended)
        assert TASK.score([t])[0] == pytest.approx(rows.scores[i])
        assert rows.ended[i] == ended


def test_answers_to_one_prompt_stand_together(made):
    rows = rollout(made)
    np.testing.assert_array_equal(rows.tokens[0::2, :4], rows.tokens[1::2, :4])
    assert len(np.unique(rows.tokens[:, :4], axis=0)) > 1


def test_a_record_can_be_saved_and_looked_at(made, tmp_path):
    rows = rollout(made)
    record.save(rows, tmp_path / "rollout.safetensors")
    back = record.load(tmp_path / "rollout.safetensors")
    assert jax.tree.all(jax.tree.map(np.array_equal, rows, back))
    (sample,) = record.samples(rows, lambda ids: " ".join(map(str, ids)), 1)
    assert sample["prompt"] == " ".join(map(str, rows.tokens[0, :4]))
    assert len(sample["answer"].split()) == rows.mask[0].sum()


def test_a_file_that_is_no_rollout(tmp_path):
    save_file({"tokens": np.zeros(3)}, str(tmp_path / "x"))
    with pytest.raises(ValueError, match="no rollout: advantages"):
        record.load(tmp_path / "x")


def test_the_game_pays_once_and_its_words_have_no_loss():
    task = tasks.guess(3, 2)
    settings = dataclasses.replace(
        SETTINGS, answers=1, prompts=16, kl=0.0, estimator=Estimator("gae", lam=1.0, whiten=False)
    )
    rows = Rollout(**first(settings, task=task)[3]["rollout"])
    said = rows.mask == 1
    assert (
        not said[:, 1].any() and np.isin(rows.targets[:, 1], [0, tasks.HIGHER, tasks.LOWER]).all()
    )
    assert set(rows.mask.sum(1)) <= {1, 2} and (rows.tokens >= 0).all()
    np.testing.assert_allclose(rows.rewards.sum(1), rows.scores, atol=1e-6)
    assert (rows.scores > 0).any()
    to_come = np.where(said, rows.scores[:, None], 0)
    np.testing.assert_allclose(rows.returns, to_come, atol=1e-6)  # of all choices of the game
    np.testing.assert_array_equal(rows.ended, rows.scores > 0)


def test_the_critic_reads_its_own_trunk():
    params = with_critic(start(critic=False), 16, separate=True)
    params["critic"]["value"]["kernel"] = jnp.ones((16, 1))
    batch = first()[2]
    both = said(MODEL, params, batch)
    assert np.abs(both.values).max() > 0
    shared = {**start(critic=False), "value": params["critic"]["value"]}
    np.testing.assert_allclose(both.values, said(MODEL, shared, batch).values, atol=1e-5)
    with pytest.raises(ValueError, match="a critic already"):
        with_critic(params, 16)


@pytest.mark.parametrize(
    ("scores", "message"),
    [(np.zeros((2, 1)), r"expected \(2,\)"), (np.array([0, np.nan]), "answer 1.*is nan")],
)
def test_a_reward_that_is_none(scores, message):
    task = TASK._replace(score=lambda transcripts: scores)
    two = [tasks.Transcript([2, 3], [4], [1], False)] * 2
    with pytest.raises(ValueError, match=message):
        scored(task, two)


def test_what_settings_refuse():
    with pytest.raises(ValueError, match="do not split"):
        Rollouts(prompts=3, minibatches=2)
    with pytest.raises(ValueError, match="rloo compares answers"):
        Rollouts(estimator=Estimator("rloo"))
    with pytest.raises(ValueError, match="no estimator"):
        Estimator("ga")
    with pytest.raises(ValueError, match="above 0"):
        Rollouts(temperature=0.0)
    with pytest.raises(ValueError, match="begins above 0"):
        Rollouts(target_kl=1.0)
    with pytest.raises(ValueError, match="one of k1"):
        Rollouts(kl_kind="k4")
    with pytest.raises(ValueError, match="'ppo' or 'reinforce'"):
        Loss("grpo")
    with pytest.raises(ValueError, match="needs a reference"):
        rollout_source(MODEL, TASK, SETTINGS)


def test_a_penalty_in_the_loss_needs_a_reference():
    plain = dataclasses.replace(SETTINGS, kl=0.0)
    made, params = rollout_source(MODEL, TASK, plain), start()
    batch, _ = made.next(made.init(jax.random.key(0)), params, None, jax.random.key(0), {})
    assert "reference" not in batch
    with pytest.raises(ValueError, match="needs a reference"):
        policy_gradient(MODEL, Loss(kl_weight=0.1))(params, None, batch, None)


def test_best_scores_are_those_of_the_best_policy():
    rng = np.random.default_rng(0)
    for task, best in (
        (tasks.copy(), lambda p: [*p[1:-1], tasks.END]),
        (tasks.count_up(), lambda p: [*range(p[1] + 1, tasks.DIGIT + 7), tasks.END]),
        (tasks.add(), lambda p: [p[1] + p[2] - tasks.DIGIT, tasks.END]),
    ):
        prompts = task.prompts(rng, 20)
        ids = [best(p) for p in prompts]
        found = [
            tasks.Transcript(p, x, [1] * len(x), True) for p, x in zip(prompts, ids, strict=True)
        ]
        assert (task.score(found) == task.best).all()
        assert max(len(p) + len(x) for p, x in zip(prompts, ids, strict=True)) <= task.length + 1
        assert max(map(len, ids)) <= task.max_tokens


def test_halving_is_the_best_at_guessing():
    task = tasks.guess()
    scores = []
    for hidden in range(7):
        low, high, t = 0, 6, tasks.Transcript([tasks.ASK, -1 - hidden], [], [], False)
        for _ in range(3):
            middle = (low + high) // 2
            t = t._replace(ids=[*t.ids, tasks.DIGIT + middle], chosen=[*t.chosen, 1])
            reply = task.reply(t)
            if reply is None:
                break
            low, high = (middle + 1, high) if reply == [tasks.HIGHER] else (low, middle - 1)
            t = t._replace(ids=[*t.ids, *reply], chosen=[*t.chosen, 0])
        scores.append(task.score([t])[0])
    assert np.mean(scores) == pytest.approx(task.best) and task.best == pytest.approx(
        0.857, abs=1e-3
    )


def test_the_clock_knows_the_phases():
    clock = Clock()
    first(clock=clock)
    assert set(clock.seconds) == {"generate", "score", "rescore"}
    with clock("generate"):
        pass
    assert clock.seconds["update"] > 0
    assert sum(clock.shares().values()) == pytest.approx(1)


def test_estimators_by_hand():
    rewards = jnp.array([[0.0, 1.0], [0.0, 3.0], [2.0, 0.0], [4.0, 0.0]])
    mask = jnp.array([[1, 1], [1, 1], [1, 0], [1, 0]])
    zero = jnp.zeros_like(rewards)
    found = {
        kind: Estimator(kind, whiten=False)(rewards, zero, mask, 2)[0]
        for kind in ("reinforce", "baseline", "rloo", "grpo")
    }
    np.testing.assert_allclose(found["reinforce"], [[1, 1], [3, 3], [2, 0], [4, 0]])
    mean = (1 + 1 + 3 + 3 + 2 + 4) / 6
    np.testing.assert_allclose(
        found["baseline"], [[1 - mean] * 2, [3 - mean] * 2, [2 - mean, 0], [4 - mean, 0]], atol=1e-6
    )
    np.testing.assert_allclose(found["rloo"], [[-2, -2], [2, 2], [-2, 0], [2, 0]])
    np.testing.assert_allclose(found["grpo"][:, 0], np.array([-1, 1, -1, 1]) / 2**0.5, atol=1e-3)


def test_kl_in_the_rewards_is_that_of_the_record(made):
    rows = rollout(made)
    kl = kl_estimate(rows.log_probs, rows.reference, "k1")
    assert record.statistics(rows)["kl"] == pytest.approx(
        float(np.sum(kl * rows.mask) / 8), abs=1e-5
    )


def test_an_answer_depends_on_its_prompt_and_key_alone():
    params, prompts = start(), [[2, 3, 4, 2], [2, 4, 4, 2], [2, 5, 3, 2]]
    sampling, rng = Sampling(max_tokens=3), jax.random.key(0)
    whole, _ = play(MODEL, params, TASK, prompts, sampling, rng)
    part, _ = play(MODEL, params, TASK, prompts[:2], sampling, rng)
    assert whole[:2] == part
