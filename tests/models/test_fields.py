"""Fields of a config.json that nobody knows are refused; those that say nothing may stand there."""

import pytest

from research.models.families import ConfigError, read

QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    "field",
    [
        {"attn_logit_softcapping": 30.0},
        {"num_experts": 8},
        {"quantization_config": {"quant_method": "gptq"}},
        {"residual_multiplier": 0.22},
    ],
)
def test_a_field_that_may_change_the_result_is_refused_by_name(field):
    with pytest.raises(ConfigError, match=f"{next(iter(field))} = .* not known here"):
        read(QWEN | field)


def test_what_says_nothing_or_is_off_may_stand_there():
    _, plain = read(QWEN)
    more = {"transformers_version": "5.0", "use_cache": True, "initializer_range": 0.1}
    off = {"attn_logit_softcapping": None, "use_qk_norm": False, "layer_scales": []}
    assert read(QWEN | more | off)[1] == plain


def test_all_unknown_fields_are_named_at_once():
    with pytest.raises(ConfigError, match="a = 1, b = 'x' may change"):
        read(QWEN | {"b": "x", "a": 1})
