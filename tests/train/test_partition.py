import jax
import jax.numpy as jnp
import pytest
from perceptron import assert_bitwise, factored, params

from research.paths import RuleError, named_leaves
from research.train.partition import combine, partition


def test_holes_lie_inside_a_weight_and_combine_restores_it():
    tree = factored()
    trainable, frozen = partition(tree, r".*/kernel/(a|b)")
    assert [name for name, _ in named_leaves(trainable)] == ["hidden/kernel/a", "hidden/kernel/b"]
    assert trainable["hidden"]["kernel"].base is None and frozen["hidden"]["kernel"].a is None
    assert_bitwise(combine(trainable, frozen), tree)


def test_pairs_take_the_first_match_and_must_cover_all():
    trainable, frozen = partition(
        params(), [(r".*/bias", False), (r"hidden/.*", True), (r".*", False)]
    )
    assert [name for name, _ in named_leaves(trainable)] == ["hidden/kernel"]
    assert len(jax.tree.leaves(frozen)) == 3
    with pytest.raises(RuleError, match="no rule covers 'norm/scale'"):
        partition(params(), [(r"hidden/.*", True), (r"out/.*", False)])


@pytest.mark.parametrize("rule", [r".*/kernle", [(r".*/kernle", True), (r".*", False)]])
def test_a_rule_that_matches_nothing_is_an_error(rule):
    with pytest.raises(RuleError, match=r"'\.\*/kernle' matches none of 4 paths"):
        partition(params(), rule)


def test_codes_cannot_be_trained():
    with pytest.raises(TypeError, match="codes is int8 and cannot be trained"):
        partition({"codes": jnp.zeros(3, jnp.int8), "scale": jnp.ones(3)}, ".*")


def test_combine_refuses_trees_that_overlap():
    with pytest.raises(ValueError, match="both trees"):
        combine({"a": jnp.ones(1)}, {"a": jnp.ones(1)})
