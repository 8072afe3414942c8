"""How runs of reinforcement learning are measured: when one is solved, how far gradients agree, tables."""

import numpy as np
import pytest
from made_up import rows

from experiments import policy_gradients, ppo_known_truth
from experiments.shared.solved import STOP, Solved
from research.train.stopping import Waiting


@pytest.mark.parametrize("values, after", [([1, 2, 9, 0], 30), ([9, 1], 10), ([1, 2, 3], None)])
def test_training_ends_at_the_evaluation_after_it_is_solved(values, after):
    given, waiting, seen = iter(values), Waiting(), 0
    solved = Solved(lambda params: next(given), wanted=5)
    while seen < len(values) and not STOP.stops(waiting):
        solved.drawn, seen = solved.drawn + 10, seen + 1
        waiting = STOP.after(waiting, solved(None))
    assert solved.after == after and solved.best == max(values[:seen])
    assert STOP.stops(waiting) == (after is not None)


def test_gradients_of_a_baseline_agree_more_than_those_of_plain_rewards():
    params = policy_gradients.half_way(batch=32, iterations=6)
    methods = [policy_gradients.Method(kind) for kind in ("reinforce", "baseline")]
    found = [policy_gradients.agreement(method, params, 32, 0) for method in methods]
    assert -0.1 < found[0] < found[1] < 1


def test_tables_and_figures_of_made_up_rows():
    def learned(config):
        curve = {f"curve/{i:03d}": i / 10 for i in range(10)}
        more = {"score": 0.9, "agreement": 0.5, "reached": config.seed % 2, **curve}
        return more | ({"answers": 1280.0} if config.seed % 2 else {})

    made = rows(policy_gradients, learned)
    lines = policy_gradients.table(made).splitlines()
    assert len(lines) == 2 + 7 + 2 and "2 of 5 | 1,280" in lines[2]
    assert len(policy_gradients.figure(made).axes[0].lines) == 7

    def solved(config):
        found = {"solved": config.kl == 0, "best": 1.0, "drawn": 5000.0, "last": 1.0}
        return found | ({} if config.kl else {"after": 1000.0 * (config.seed + 1)})

    made = rows(ppo_known_truth, solved)
    lines = ppo_known_truth.table(made).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:12]] == [
        *("copy", "copy, KL penalty 0.1", "copy, lam 0", "copy, lam 1", "copy, no clip"),
        *("count_up", "add", "guess, entropy 0.01", "guess", "CartPole-v1"),
    ]
    assert "5 of 5 | 3,000 | 1,581 | 5,000 | 1" in lines[2] and "0 of 3 | – | – | –" in lines[3]
    assert len(ppo_known_truth.figure(made).axes[0].lines) == 40
    np.testing.assert_equal(len(ppo_known_truth.figure(made).axes[0].get_yticks()), 10)
