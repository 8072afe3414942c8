"""Rope as the fields of a config.json say it, for the families that turn whole heads half-split."""

from __future__ import annotations

from research.models.families.checkpoint import ConfigError, refuse
from research.models.position import Linear, Llama3, Ntk, Rope, Yarn


def rope_from(config: dict) -> Rope:
    """Rope from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    for place in (config, given):
        refuse(place, "partial_rotary_factor", None, 1)  # these families turn whole heads
    theta = given.get("rope_theta", config.get("rope_theta", 10_000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    # In this order, as transformers reads them.
    original = (
        config.get("original_max_position_embeddings")
        or given.get("original_max_position_embeddings")
        or config.get("max_position_embeddings")
    )
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = Linear(given["factor"])
    elif kind == "llama3":
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        scaling = Llama3(given["factor"], low, high, original)
    elif kind == "yarn":
        for name in ("mscale", "mscale_all_dim", "truncate"):
            refuse(given, name, None, *([True] if name == "truncate" else []))
        fast, slow = given.get("beta_fast") or 32, given.get("beta_slow") or 1
        scaling = Yarn(given["factor"], original, fast, slow, given.get("attention_factor"))
    else:
        raise ConfigError(f"config.json: rope_type {kind!r} is not implemented")
    return Rope(float(theta), scaling=scaling)


def rope_parameters(position: Rope) -> dict:
    """The inverse of `rope_from`."""
    given: dict = {"rope_type": "default", "rope_theta": position.theta}
    scaling = position.scaling
    if scaling is None:
        return given
    if isinstance(scaling, Ntk):
        raise ConfigError("Hugging Face has no rope_type for a fixed NTK factor")
    given["factor"] = scaling.factor
    if isinstance(scaling, Linear):
        return {**given, "rope_type": "linear"}
    given["original_max_position_embeddings"] = scaling.original_length
    if isinstance(scaling, Llama3):
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        return {**given, "rope_type": "llama3", "low_freq_factor": low, "high_freq_factor": high}
    given |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    if scaling.attention_factor is not None:
        given["attention_factor"] = scaling.attention_factor
    return {**given, "rope_type": "yarn"}
