"""The types and the arithmetic of a config.json, looked at before a model is made of it."""

from __future__ import annotations

from typing import Any

from research.models.families.checkpoint import ConfigError

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "n_embd",
    "n_layer",
    "n_head",
    "n_positions",
    "num_layers",
    "padded_vocab_size",
    "inner_hidden_size",
    "ffn_hidden_size",
    "kv_channels",
    "multi_query_group_num",
    "max_sequence_length",
    "seq_length",
    "model_max_length",
)
# null says: as follows from the others, or not at all
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "n_inner", "sliding_window")
NUMBERS = (
    "rms_norm_eps",
    "rope_theta",
    "layer_norm_epsilon",
    "layernorm_epsilon",
    "initializer_range",
)
RATES = ("attention_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop")
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
OBJECTS = ("rope_parameters", "rope_scaling")


def require_fields(config: dict[str, Any]) -> None:
    """ConfigError naming the first field whose value is of the wrong type or does not fit.

    A field that is absent is none of its business: the family says which ones it needs.
    """
    for name in (*SIZES, *OPTIONAL_SIZES):
        allowed = is_size(config.get(name)) or (name in OPTIONAL_SIZES and config.get(name) is None)
        require(config, name, allowed, "a whole number above 0")
    for name in NUMBERS:
        require(config, name, is_number(config.get(name)) and config[name] > 0, "a number above 0")
    for name in RATES:
        rate = config.get(name)
        require(config, name, is_number(rate) and 0 <= rate < 1, "a number from 0 to below 1")
    for name in SWITCHES:
        require(config, name, isinstance(config.get(name), bool | None), "true or false")
    for name in OBJECTS:
        require(config, name, isinstance(config.get(name), dict | None), "an object or null")
    named = config.get("architectures")
    strings = isinstance(named, list) and all(isinstance(name, str) for name in named)
    require(config, "architectures", strings, "a list of names")
    require_heads(config)


def require(config: dict[str, Any], name: str, holds: bool, wanted: str) -> None:
    if name in config and not holds:
        raise ConfigError(f"config.json: {name} = {config[name]!r}; expected {wanted}")


def require_heads(config: dict[str, Any]) -> None:
    """Query heads share key/value heads evenly, and a head's features turn in pairs."""
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    groups = "multi_query_group_num" if "multi_query_group_num" in config else "num_key_value_heads"
    size_name = "kv_channels" if "kv_channels" in config else "head_dim"
    shared, size = config.get(groups), config.get(size_name)
    if heads and shared and heads % shared:
        raise ConfigError(
            f"config.json: {groups} = {shared} does not divide num_attention_heads = {heads}"
        )
    if width and heads and size is None and width % heads:
        raise ConfigError(
            f"config.json: num_attention_heads = {heads} does not divide hidden_size = {width}, "
            "and there is no head_dim"
        )
    if size is not None and size % 2:
        raise ConfigError(f"config.json: {size_name} = {size}; RoPE needs an even number")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
