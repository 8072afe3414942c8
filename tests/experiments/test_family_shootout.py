"""Families of one size: their counts, the parts that tell them apart, and ratios of speeds."""

import dataclasses

import pytest

from experiments import family_shootout as shootout
from research.models import decoder
from research.models.additive import Learned
from research.models.position import Alibi, Rope
from research.runs import results

NARROW = {"width": 64, "heads": 4, "kv_heads": 1, "layers": 3, "ffn": 1000}


def model_of(family, **sizes):
    config = dataclasses.replace(shootout.BASE, family=family, **sizes)
    return family(config, shootout.equal_ffn(config))


def parts_of(family):
    model = family(shootout.BASE, ffn=8)
    return model, model.stacks[0].pattern[0]


@pytest.mark.parametrize("sizes", [{}, NARROW], ids=["base", "narrow"])
def test_counts_are_within_one_percent_of_each_other(sizes):
    models = [decoder.Decoder(model_of(each, **sizes)) for each in shootout.FAMILIES.values()]
    counts = [decoder.count_parameters(model) for model in models]
    assert max(counts) <= 1.01 * min(counts)


def test_llama_keeps_its_width_and_has_the_count_of_its_formula():
    model = model_of(shootout.llama2)
    assert model.stacks[0].pattern[0].ffn.features == 344
    layer = 4 * 128 * 128 + 3 * 128 * 344 + 2 * 128
    assert decoder.count_parameters(decoder.Decoder(model)) == 2 * 1024 * 128 + 4 * layer + 128


def test_what_is_compared_are_the_families_parts():
    """Position, tied head, and the block's key/value heads, biases of q and of o, in the papers."""
    heads = lambda head: "tied" if head is None else type(head).__name__  # noqa: E731
    found = {}
    for name, family in shootout.FAMILIES.items():
        model, block = parts_of(family)
        attention, biases = block.attention, (block.attention.bias, block.attention.out_bias)
        found[name] = (model.position, heads(model.head), attention.kv_heads, *biases)
    assert found == {
        "GPT-2": (Learned(128), "tied", 8, True, True),
        "LLaMA": (Rope(), "Linear", 8, False, False),
        "ChatGLM2": (Rope(fraction=0.5, interleaved=True), "Linear", 2, True, False),
        "Baichuan 2-13B": (Alibi(), "NormHead", 8, False, False),
        "Qwen2": (Rope(1e6), "tied", 2, True, False),
    }


def test_nothing_is_dropped():
    """Training is alike for all: GPT-2's own dropout is off."""
    for family in shootout.FAMILIES.values():
        model, block = parts_of(family)
        assert (model.dropout, block.dropout, block.attention.dropout) == (0, 0, 0)


def test_speeds_are_compared_within_a_seed():
    def group(speeds):
        rows = [{"config": {"seed": s}, "metrics": {"speed": v}} for s, v in speeds.items()]
        return results.Group({}, tuple(rows))

    own, llama = group({0: 30.0, 1: 10.0, 2: 7.0}), group({1: 40.0, 0: 20.0})
    assert shootout.ratio(own, llama, "speed") == results.summary([1.5, 0.25])
    assert shootout.ratio(own, group({5: 1.0}), "speed") == "–"
