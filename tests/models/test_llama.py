"""The LLaMA family: published sizes, and config.json in both directions."""

import pytest

from research.models import decoder
from research.models.families import ConfigError, find, llama
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
    assert find(config).from_huggingface(config) == llama.PRESETS[name]


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
