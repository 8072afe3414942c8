"""Every method of the table on a tiny model: what trains, what stays, and what a step costs."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from experiments import peft_compare
from experiments.shared import methods, sarcasm
from experiments.shared.methods import METHODS
from research.data import packing, supervised
from research.models import decoder
from research.models.families.llama import llama
from research.paths import named_leaves
from research.plan.program import state_bytes
from research.runs import override
from research.runs.canonical import canonical
from research.runs.overrides import OverrideError
from research.train.partition import partition

LENGTH, STEPS = 6, 3
SMALL = {"LoRA": {"rank": 2}, "DoRA": {"rank": 2}, "AdaLoRA": {"rank": 2, "start": 3}}
SMALL |= {"prefix tuning": {"length": 2, "hidden": 8}, "P-tuning v2": {"length": 2}}
SMALL |= {name: {"length": 2} for name in ("prompt tuning", "P-tuning")}
SMALL |= {name: {"size": 3} for name in METHODS if name.endswith("adapters")}


@dataclasses.dataclass(frozen=True)
class Lesson:
    warmup_steps: int = 1
    steps: int = STEPS
    batch_size: int = 4
    seed: int = 0


@pytest.fixture(scope="module")
def base():
    model = decoder.Decoder(llama(40, 2, 32, 4, 2, 96, max_length=32, tied=True))
    return model, decoder.init(model, jax.random.key(0))


def adapted_by(name, base):
    method = dataclasses.replace(METHODS[name], **SMALL.get(name, {}))
    return method.apply(*base, jax.random.key(1), STEPS)


def headlines(before, count=8):
    """Random tokens, then a label 1 or 2."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        ids = [*rng.integers(3, 40, LENGTH - 1).tolist(), int(rng.integers(1, 3))]
        found.append(supervised.prepend(supervised.shift(ids, [0] * (LENGTH - 1) + [1]), before))
    table = packing.pad(found, LENGTH + len(before))
    return sarcasm.Headlines(table, table, [1, 2])


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("nothing", "full")])
def test_no_leaf_of_the_model_trains(name, base):
    adapted = adapted_by(name, base)
    trainable, frozen = partition(adapted.params, adapted.rule)
    own = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(base[1])]
    assert sorted(own) == sorted(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(frozen))
    assert 0 < sum(leaf.size for leaf in jax.tree.leaves(trainable)) < 20_000
    assert 0 < adapted.lr < 0.1


@pytest.mark.parametrize("name", ["nothing", "AdaLoRA", "prompt tuning"])
def test_training_moves_what_the_rule_names_and_nothing_else(name, base, tmp_path):
    adapted = adapted_by(name, base)
    params, found = sarcasm.adapt(adapted, headlines(adapted.before), Lesson(), tmp_path)
    before, after = dict(named_leaves(adapted.params)), dict(named_leaves(params))
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    expected = {path for path in before if re.fullmatch(adapted.rule or "", path)}
    assert moved == expected
    assert found["trainable_parameters"] == sum(before[path].size for path in moved)
    assert 0 <= found["accuracy"] <= 1 and found["nll"] > 0


def job(name, base):
    adapted = adapted_by(name, base)
    config = peft_compare.Config(warmup_steps=1, steps=STEPS, batch_size=4)
    return peft_compare.job(adapted, headlines(adapted.before), config)


@pytest.fixture(scope="module")
def full(base):
    return job("full", base)


def test_lora_takes_at_most_three_quarters_of_the_full_step(base, full):
    assert 0.5 < job("LoRA", base).flops() / full.flops() <= 0.75


def test_flops_by_hand(base, full):
    """Six operations a weight and token for the block matrices; the head at one position a row."""
    matrices = sum(leaf.size for path, leaf in named_leaves(base[1]) if path.endswith("/kernel"))
    table, tokens, rows = base[1]["embed"]["table"].size, 4 * LENGTH, 4
    products = 6 * (matrices * tokens + table * rows)
    assert 1 < full.flops() / products < 1.3


def test_adam_keeps_two_numbers_for_each_that_trains(base, full):
    trained = sum(leaf.size for leaf in jax.tree.leaves(base[1]))
    assert 0 <= full.optimizer_bytes() - 8 * trained < 100
    assert job("BitFit", base).optimizer_bytes() < 8 * trained / 10
    assert state_bytes({"a": np.zeros((3, 2), np.float32), "b": np.zeros((), np.int64)}) == 32


def test_less_that_trains_is_less_memory(base, full):
    found, most = job("BitFit", base).memory(), full.memory()
    assert found["peak_bytes"] == found["temporary_bytes"] + found["argument_bytes"]
    state = 8 * sum(leaf.size for leaf in jax.tree.leaves(base[1]))
    assert most["argument_bytes"] - found["argument_bytes"] > 0.8 * state


def test_every_layer_is_counted():
    """In a scan four would cost what two do."""

    def flops(layers):
        model = decoder.Decoder(llama(40, layers, 32, 4, 2, 96, max_length=32, tied=True))
        shapes = jax.eval_shape(lambda: decoder.init(model, jax.random.key(0)))
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        return job("full", (model, zeros)).flops()

    assert 1.7 < flops(4) / flops(2) < 2


def test_a_method_is_one_changed_line():
    config = override(peft_compare.BASE, {"method": "experiments.shared.methods:DoRA"})
    assert config == dataclasses.replace(peft_compare.BASE, method=methods.DoRA())
    assert override(config, {"method.rank": "4"}).method == methods.DoRA(rank=4)
    with pytest.raises(OverrideError, match=r"cannot find '.*:DORA'"):
        override(config, {"method": "experiments.shared.methods:DORA"})
    with pytest.raises(OverrideError, match=r"has no field 'method\.size'"):
        override(config, {"method.size": "4"})


def test_every_method_has_a_canonical_form_of_its_own():
    assert len({canonical(method) for method in METHODS.values()}) == len(METHODS)


def test_the_allocation_is_as_long_as_the_training(base):
    adapted = adapted_by("AdaLoRA", base)
    config = Lesson(steps=STEPS)
    assert sarcasm.optimizer_of(adapted, config).finish.total_steps == config.steps
