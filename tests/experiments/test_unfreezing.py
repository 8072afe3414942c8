"""What each strategy moves, and the table and figure of made-up rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import unfreezing
from experiments.shared import headline_classes
from experiments.unfreezing import BASE, STRATEGIES, SWEEP, Strategy, moved
from research.models import decoder
from research.models.families.llama import llama
from research.paths import named_leaves
from research.runs import override
from research.runs.canonical import run_id, to_json
from research.train.optim import SGD
from research.train.optim import optimizer as make_optimizer
from research.train.partition import combine, partition

LAYERS = 3


@pytest.fixture(scope="module")
def params():
    model = decoder.Decoder(llama(32, LAYERS, 16, 4, 2, 24, tied=True))
    return headline_classes.with_head(model, decoder.init(model, jax.random.key(0)), seed=0)


def changed(before, after):
    """How many numbers differ, by the two trees alone."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return sum(int(np.sum(np.asarray(a != b))) for a, b in pairs)


def stepped(params, strategy, steps):
    """`params` after so many steps down a gradient of ones."""
    rates = strategy.rates(params)
    trainable, frozen = partition(params, tuple((e, rate is not None) for e, rate in rates))
    kept = tuple((e, rate) for e, rate in rates if rate is not None)
    update = make_optimizer(SGD(lr=1.0, clip_norm=None, rates=kept), trainable)
    state = update.init(trainable)
    for _ in range(steps):
        moves, state = update.update(jax.tree.map(jnp.ones_like, trainable), state, trainable)
        trainable = jax.tree.map(jnp.add, trainable, moves)
    return combine(trainable, frozen)


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_is_said_to_move_is_what_moves(params, name):
    strategy = STRATEGIES[name]
    steps = strategy.every * (LAYERS + 1) + 1
    count = changed(params, stepped(params, strategy, steps))
    assert count == moved(params, strategy.rates(params))


def test_the_last_depths_and_the_first_steps_of_unfreezing(params):
    sizes = {name: leaf.size for name, leaf in named_leaves(params)}
    ends = sizes["score/kernel"] + sizes["final_norm/scale"]
    layers = sum(size for name, size in sizes.items() if name.startswith("stack_0/"))
    assert moved(params, Strategy(last=1).rates(params)) == ends
    assert moved(params, Strategy(last=3).rates(params)) == ends + layers * 2 // 3
    assert moved(params, Strategy().rates(params)) == sum(sizes.values())
    gradual = Strategy(every=2)
    assert changed(params, stepped(params, gradual, 2)) == ends
    assert changed(params, stepped(params, gradual, 3)) == ends + layers // 3


def test_a_strategy_is_one_of_two_kinds():
    with pytest.raises(ValueError, match="not both"):
        Strategy(last=1, every=4)


def test_unfreezing_is_done_before_the_run_ends():
    depths = BASE.layers + 2
    assert all(each.every * (depths - 1) < BASE.steps for each in STRATEGIES.values())


def made_up():
    rows = []
    for number, overrides in enumerate([*SWEEP, {"steps": 5}]):
        config = override(BASE, overrides)
        metrics = {"accuracy": 0.6 + 0.01 * number, "trainable_parameters": 1_000}
        metrics |= {"text_nll": 3 + 0.1 * number, "text_nll_before": 2.5}
        row = {"id": run_id("made_up", config), "config": to_json(config), "metrics": metrics}
        rows.append(row | {"overrides": to_json(overrides)})
    return rows


def test_table_and_figure():
    rows = made_up()
    lines = unfreezing.table(rows).splitlines()
    first = "| all weights, one rate | 1,000 | 0.63 ± 0.0424 | 3.3 ± 0.424 |"  # 0.60, 0.66; 3, 3.6
    assert lines[2] == first and len(lines) == 2 + len(STRATEGIES) + 2
    axes = unfreezing.figure(rows).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == list(STRATEGIES)
    points = [(c.lines[0].get_xdata()[0], c.lines[0].get_ydata()[0]) for c in axes.containers]
    np.testing.assert_allclose(points[1], [3.4, 0.64])
