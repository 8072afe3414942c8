"""The Qwen family: published sizes, config.json in both directions, sliding windows."""

import dataclasses

import pytest

from research.models import decoder
from research.models.families import ConfigError, llama, qwen, read

# Those of Qwen2 follow from the sizes in its report, Table 1, which are Qwen2.5's.
PUBLISHED = {
    "qwen1.5-0.5b": 463_987_712,
    "qwen1.5-1.8b": 1_836_828_672,
    "qwen1.5-4b": 3_950_369_280,
    "qwen1.5-7b": 7_721_324_544,
    "qwen1.5-14b": 14_167_290_880,
    "qwen1.5-32b": 32_512_218_112,
    "qwen1.5-72b": 72_287_920_128,
    "qwen1.5-110b": 111_209_914_368,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
}


@pytest.mark.parametrize("name", qwen.PRESETS)
def test_parameter_counts_are_the_published_ones(name):
    assert decoder.count_parameters(decoder.Decoder(qwen.PRESETS[name])) == PUBLISHED[name]


@pytest.mark.parametrize("name", qwen.PRESETS)
def test_config_round_trip(name):
    config = qwen.to_huggingface(qwen.PRESETS[name])
    assert read(config)[1] == qwen.PRESETS[name]


SMALL = qwen.qwen(9, 4, 8, 2, 1, 8)
BASE = qwen.to_huggingface(SMALL)
SLIDING = {"use_sliding_window": True, "sliding_window": 4}
FULL, SLIDES = qwen.LAYER_TYPES


def windows(**change):
    given = {name: value for name, value in BASE.items() if name != "layer_types"}
    stacks = qwen.from_huggingface({**given, **change}).stacks
    return [b.attention.window for s in stacks for b in s.pattern * s.count]


def test_which_layers_slide():
    assert windows() == [None] * 4
    assert windows(sliding_window=4, max_window_layers=1) == [None] * 4
    assert windows(**SLIDING, max_window_layers=1) == [None, 4, 4, 4]
    assert windows(**SLIDING) == [None] * 4  # max_window_layers is 28 unless given
    assert windows(**SLIDING, max_window_layers=0) == [4] * 4
    types = [SLIDES, FULL, FULL, SLIDES]
    assert windows(**SLIDING, max_window_layers=9, layer_types=types) == [4, None, None, 4]


@pytest.mark.parametrize("pattern", [[None, 4, 4, 4], [4, None, 4, None], [4, 4, None, 4], [4] * 4])
def test_windows_round_trip(pattern):
    config = qwen.qwen(9, 4, 8, 2, 1, 8, windows=pattern)
    described = qwen.to_huggingface(config)
    assert qwen.from_huggingface(described) == config
    if pattern[0] is None:
        assert described["max_window_layers"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layer_types": [FULL, SLIDES, FULL, FULL]},
            "use_sliding_window says that nothing slides",
        ),
        ({"layer_types": [FULL]}, r"layer_types = .*; expected 4 of full_attention or sliding"),
        ({"layer_types": [FULL] * 3 + ["chunked"]}, "layer_types = .*chunked"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented"),
    ],
)
def test_what_would_change_the_result_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        qwen.from_huggingface({**BASE, **change})


def test_what_is_not_a_qwen_is_not_saved_as_one():
    two_windows = qwen.qwen(9, 4, 8, 2, 1, 8, windows=[2, 3, 2, 3])
    block = SMALL.stacks[0].pattern[0]
    biased = block.clone(attention=block.attention.clone(out_bias=True))
    other = dataclasses.replace(SMALL, stacks=(decoder.Stack(4, (biased,)),))
    for config in (two_windows, other, llama.llama(9, 4, 8, 2, 1, 8)):
        with pytest.raises(ConfigError, match="Qwen2ForCausalLM has no stacks"):
            qwen.to_huggingface(config)
    with pytest.raises(ConfigError, match="LlamaForCausalLM has biases on all"):
        llama.to_huggingface(SMALL)


def test_as_many_windows_as_layers():
    with pytest.raises(ValueError, match="one window for each of 4 layers"):
        qwen.qwen(9, 4, 8, 2, 1, 8, windows=[None, 4])
