"""What the optimizer does to learned steps, and the table and figure of made-up rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import qat_low_bit
from experiments.qat_low_bit import BASE, METHODS, SWEEP, WHILE, optimizer_of
from experiments.shared.few_bits import LINEAR
from research.models import decoder
from research.models.families.llama import llama
from research.paths import named_leaves
from research.runs import override
from research.runs.canonical import run_id, to_json
from research.train.optim import optimizer as make_optimizer
from research.weights import fake
from research.weights.formats import Integer


def test_steps_learn_at_their_own_rate_and_do_not_decay():
    """Adam moves every number by its rate at first, less the decay where there is one."""
    model = decoder.Decoder(llama(16, 1, 8, 2, 2, 8, tied=True))
    start = fake.add(decoder.init(model, jax.random.key(0)), LINEAR, Integer(2, "row"), True)
    config = optimizer_of(BASE, learned_step=True)
    update = make_optimizer(config, start)
    state = update.init(start)
    ones = jax.tree.map(jnp.ones_like, start)
    for _ in range(2):  # the first has a rate of 0
        moves, state = update.update(ones, state, start)
    rate, decay = float(config.lr(1)), config.weight_decay
    before = dict(named_leaves(start))
    for name, move in named_leaves(moves):
        share = BASE.step_rate if name.endswith("/step") else 1.0
        kept = name.endswith(("/step", "/scale"))
        expected = -rate * share * (1 + (0 if kept else decay) * before[name])
        np.testing.assert_allclose(move, expected, rtol=1e-4, err_msg=name)
    assert optimizer_of(BASE, learned_step=False) == qat_low_bit.continued(BASE).optimizer()


def made_up():
    rows = []
    for number, overrides in enumerate([*SWEEP, {"more_steps": 5}]):
        config = override(BASE, overrides)
        found = {"nll/base": 2.5, "nll/full": 2.0, "finished_apart": 1e-7 * (number + 1)}
        for bits in config.bits:
            found[f"bits_per_parameter/{bits}"] = bits + 0.25
            for place, method in enumerate(METHODS):
                rise = (4 - bits) * 0.1 * (len(METHODS) - place) + 0.2 * number
                found |= {f"nll/{method}/{bits}": 2 + rise, f"rise/{method}/{bits}": rise}
        row = {"id": run_id("made_up", config), "config": to_json(config), "metrics": found}
        rows.append(row | {"overrides": to_json(overrides)})
    return rows


def test_table_and_figure():
    table = qat_low_bit.table(made_up())
    lines = table.splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines[: len(METHODS)]] == list(METHODS)
    # seeds 0 and 1: rises of 0 and 0.2 at 4 bits, of 0.8 and 1.0 at 2
    assert lines[0].startswith("| rounded | 2.100 (+0.1 ± 0.141) |")
    assert lines[0].endswith("| 2.900 (+0.9 ± 0.141) |")
    assert "over 2 seeds" in table and "within 2.0e-07" in table and "4.25, 3.25, 2.25" in table
    (axes,) = qat_low_bit.figure(made_up()).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(METHODS)
    drawn = np.asarray(axes.containers[0].lines[0].get_ydata(), float)
    np.testing.assert_allclose(drawn, [0.1, 0.5, 0.9])


@pytest.mark.parametrize("bits", BASE.bits)
def test_channels_fill_every_matrix(bits):
    """The sweep's own model can be rounded by each method: nothing is padded."""
    shape = (BASE.layers, BASE.width, BASE.heads, BASE.heads, BASE.ffn)
    model = decoder.Decoder(llama(BASE.recipe.vocab_size, *shape, max_length=512, tied=True))
    shapes = decoder.init(model, jax.random.key(0))
    for learned in WHILE.values():
        added = fake.add(shapes, LINEAR, Integer(bits, BASE.group), learned)
        assert sum(map(fake.is_fake, jax.tree.leaves(added, is_leaf=fake.is_fake))) == 7
