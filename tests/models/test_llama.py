"""The LLaMA family: published sizes, and config.json in both directions."""

import dataclasses

import pytest
from flax import linen as nn

from research.models import decoder
from research.models.block import post_norm
from research.models.families import ConfigError, find, llama, read
from research.models.layers import GatedMlp
from research.models.position import Rope
from research.paths import named_leaves

PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


@pytest.mark.parametrize("name", llama.PRESETS)
def test_parameter_counts_are_the_published_ones(name):
    assert decoder.count_parameters(decoder.Decoder(llama.PRESETS[name])) == PUBLISHED[name]


@pytest.mark.parametrize("name", llama.PRESETS)
def test_config_round_trip(name):
    config = llama.to_huggingface(llama.PRESETS[name])
    assert read(config)[1] == llama.PRESETS[name]


def test_name_map_covers_every_leaf_once():
    for config in (
        llama.PRESETS["llama-2-7b"],
        llama.llama(9, 2, 8, 2, 1, 8, attention_bias=True, mlp_bias=True),
    ):
        entries = llama.name_map(config)
        model = decoder.Decoder(config)
        names = [
            name for name, _ in named_leaves(decoder.axes(model), lambda n: isinstance(n, tuple))
        ]
        assert sorted(entry.path for entry in entries) == sorted(names)


BASE = llama.to_huggingface(llama.PRESETS["llama-2-7b"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope' is not implemented"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
    ],
)
def test_what_would_change_the_result_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        llama.from_huggingface({**BASE, **change})


def test_missing_field_is_named():
    with pytest.raises(ConfigError, match="lacks the field 'intermediate_size'"):
        llama.from_huggingface({k: v for k, v in BASE.items() if k != "intermediate_size"})


def test_unknown_architecture_is_named():
    with pytest.raises(ConfigError, match="'MambaForCausalLM'"):
        find({"architectures": ["MambaForCausalLM"]})


SMALL = llama.llama(9, 2, 8, 2, 1, 8)
BLOCK = SMALL.stacks[0].pattern[0]


@pytest.mark.parametrize(
    "block",
    [
        BLOCK.clone(ffn=GatedMlp(8, activation=nn.gelu)),
        BLOCK.clone(attention=BLOCK.attention.clone(window=4)),
        BLOCK.clone(attention=BLOCK.attention.clone(scale=0.5)),
        BLOCK.clone(residual=post_norm),
    ],
)
def test_an_ablation_is_not_saved_as_a_plain_llama(block):
    ablated = dataclasses.replace(SMALL, stacks=(decoder.Stack(2, (block,)),))
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no stacks"):
        llama.to_huggingface(ablated)


def test_stacks_are_saved_as_layers_one_after_another():
    cycle = decoder.Stack(2, (BLOCK, BLOCK))
    config = dataclasses.replace(SMALL, stacks=(SMALL.stacks[0], cycle))
    assert llama.to_huggingface(config)["num_hidden_layers"] == 6
    found = {}
    for entry in llama.name_map(config):
        if entry.name.endswith("gate_proj.weight"):
            layers = [entry.name_of(layer).split(".")[2] for layer in range(2)]
            found[entry.path.removesuffix("/ffn/gate/kernel")] = layers
    assert found == {
        "stack_0/block_0": ["0", "1"],
        "stack_1/block_0": ["2", "4"],
        "stack_1/block_1": ["3", "5"],
    }


def test_what_matters_in_training_only_is_no_hindrance_to_saving():
    block = BLOCK.clone(dropout=0.1)
    stacks = (dataclasses.replace(SMALL.stacks[0], pattern=(block,)),)
    config = dataclasses.replace(SMALL, stacks=stacks, dropout=0.1, remat="full", init_std=0.1)
    assert llama.to_huggingface(config) == llama.to_huggingface(SMALL)


def test_other_ablations_are_not_saved_either():
    partly = dataclasses.replace(SMALL, position=Rope(fraction=0.5))
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no"):
        llama.to_huggingface(partly)
    with pytest.raises(ConfigError, match=r"partial_rotary_factor = 0\.5 is not implemented"):
        llama.from_huggingface({**BASE, "partial_rotary_factor": 0.5})


def test_the_outer_original_length_counts_as_in_transformers():
    given = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    given["original_max_position_embeddings"] = 2048
    config = {**BASE, "rope_parameters": given, "original_max_position_embeddings": 4096}
    assert llama.from_huggingface(config).position.scaling.original_length == 4096
