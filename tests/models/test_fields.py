"""Fields of a config.json that nobody knows are refused; those that say nothing may stand there."""

import pytest

from research.models.families import ConfigError, chatglm, find, gpt, llama, read

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


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        (gpt.PRESETS["gpt-1"], {"n_ctx": 512, "n_special": 0, "predict_special_tokens": True}),
        (gpt.PRESETS["gpt-2"], {"n_ctx": 1024, "summary_type": "cls_index"}),
        (gpt.PRESETS["gpt-2-xl"], {"n_ctx": 1024, "output_past": True, "num_labels": 2}),
        (gpt.PRESETS["gpt-2"], {"n_ctx": 1024, "_num_labels": 1, "id2label": {"0": "LABEL_0"}}),
        (llama.PRESETS["llama-7b"], {"max_sequence_length": 2048, "pad_token_id": 0}),
        (llama.PRESETS["llama-2-7b"], {"_flash_attn_2_enabled": True, "pretraining_tp": 1}),
        (chatglm.PRESETS["chatglm2-6b"], {"vocab_size": 65_024, "classifier_dropout": None}),
        (chatglm.PRESETS["chatglm3-6b"], {"num_hidden_layers": 28, "vocab_size": 65_024}),
        (chatglm.PRESETS["chatglm-6b"], {"pre_seq_len": None, "quantization_bit": 0}),
    ],
)
def test_what_published_configs_say_besides_is_read(preset, published):
    family = next(each for each in (gpt, llama, chatglm) if preset in each.PRESETS.values())
    described = family.to_huggingface(preset)
    assert find(described) is family
    assert read(described | published) == read(described)


@pytest.mark.parametrize("field", [{"vocab_size": 65_025}, {"num_hidden_layers": 27}])
def test_chatglm_that_says_one_number_twice_and_differently_is_refused(field):
    described = chatglm.to_huggingface(chatglm.PRESETS["chatglm3-6b"])
    with pytest.raises(ConfigError, match=next(iter(field))):
        read(described | field)


def test_a_decoder_that_was_turned_into_an_encoder_is_refused():
    """False is not "off" here."""
    assert read(QWEN | {"is_causal": True})[1] == read(QWEN)[1]
    with pytest.raises(ConfigError, match="is_causal = False"):
        read(QWEN | {"is_causal": False})
