"""Prompt tuning, P-tuning and prefix tuning in PEFT's directories.

All have one tensor, prompt_embeddings: the rows [P, D] that stand before the text, or the keys and
values [P, 2 L K H] of every layer, flat as `adapters.prefix` has them. The network that they may have
come from has done its work by then, so it is not saved, and they come back as plain numbers.

PEFT puts a prompt's rows before every text by itself. Here they are the ids after the vocabulary's,
so that a text is given with them; a prefix needs no ids, and what comes back is of the text alone:

    loaded = hub.load_adapter(base, directory)
    loaded.logits(prompt.before(loaded.params, [ids]))            # [1, P + T, V], as PEFT's
    generate(loaded.model, loaded.params, prompt.before(loaded.params, texts), rng)

    loaded.logits([ids])                                          # with a prefix [1, T, V], as PEFT's
    generate(loaded.model, loaded.params, texts, rng)

In models with a sliding window PEFT's prefix slides out of it, ours never does.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.adapters import prefix
from research.adapters.prefixed import Prefixed, flat, sizes
from research.hub.checkpoint import CheckpointError
from research.hub.peft_config import fields_to_save
from research.hub.peft_modules import refuse_others, refuse_under
from research.hub.pretrained import Pretrained
from research.paths import map_named, named_leaves
from research.weights.base import is_weight
from research.weights.prompt import Prompt
from research.weights.prompt_encoder import Lstm, Mlp, is_encoder

ROWS = "prompt_embeddings"
TABLE = "embed/table"


def read(
    pretrained: Pretrained, file: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> Pretrained:
    """The model whose embedding table has the rows of a directory below its own."""
    rows = take_rows(file, config, tensors, pretrained.model.config.width)
    params = map_named(
        lambda path, leaf: Prompt(leaf, rows) if path == TABLE else leaf,
        pretrained.params,
        is_leaf=is_weight,
    )
    return dataclasses.replace(pretrained, params=params)


def read_prefix(
    pretrained: Pretrained, file: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> Pretrained:
    """The model whose rows begin with the prefix of a directory."""
    model, length = pretrained.model, config["num_virtual_tokens"]
    try:
        features = 2 * model.config.layers * prefix.require_fit(model, pretrained.params, length)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    table = take_rows(file, config, tensors, features)
    params = {**pretrained.params, "prefix": {"table": table}}
    return dataclasses.replace(pretrained, model=Prefixed(model.config, length), params=params)


def take_rows(
    file: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], size: int
) -> jax.Array:
    """prompt_embeddings [num_virtual_tokens, size] float32, when there is nothing else."""
    if tensors.keys() != {ROWS}:
        raise CheckpointError(f"{file}: holds {sorted(tensors)[:8]}; expected {ROWS} alone")
    expected = (config["num_virtual_tokens"], size)
    if tensors[ROWS].shape != expected:
        raise CheckpointError(
            f"{file}: {ROWS} {list(tensors[ROWS].shape)}; expected {list(expected)}, the virtual "
            "tokens of adapter_config.json and what this base needs for each"
        )
    return jnp.asarray(tensors[ROWS], jnp.float32)


def write(directory: Any, pretrained: Pretrained) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """adapter_config.json and the tensor of a model with a prompt."""
    refuse_others(directory, pretrained, "prompt", (Prompt,))
    leaves = dict(named_leaves(pretrained.params, is_leaf=is_weight))
    node = leaves[TABLE]
    refuse_under(directory, TABLE, "prompt", node)
    kind = "P_TUNING" if is_encoder(node.prompt) else "PROMPT_TUNING"
    fields = prompt_fields(pretrained, node.length, pretrained.model.config.width)
    config = fields_to_save(kind, **fields, **encoder_fields(node.prompt))
    return config, {ROWS: np.ascontiguousarray(node.rows())}


def write_prefix(
    directory: Any, pretrained: Pretrained
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """adapter_config.json and the tensor of a model with a prefix."""
    model, own = pretrained.model, pretrained.params["prefix"]
    base = {name: node for name, node in pretrained.params.items() if name != "prefix"}
    refuse_others(directory, dataclasses.replace(pretrained, params=base), "prefix", ())
    if not isinstance(model, Prefixed):
        raise CheckpointError(
            f"{directory}: there is a prefix among the parameters, but the model is a "
            f"{type(model).__name__}, not a Prefixed"
        )
    if not model.moves:
        raise CheckpointError(
            f"{directory}: the text stands at positions 0, 1, ... (moves=False); PEFT's stands "
            "after the prefix"
        )
    K, H = sizes(model.config)
    projected = {"encoder_hidden_size": own["hidden"]["bias"].size} if "hidden" in own else {}
    config = fields_to_save(
        "PREFIX_TUNING",
        **prompt_fields(pretrained, model.length, K * H),
        **projected,
        num_attention_heads=K,
        prefix_projection=bool(projected),
    )
    return config, {ROWS: np.ascontiguousarray(flat(own))}


def prompt_fields(pretrained: Pretrained, length: int, token_dim: int) -> dict[str, Any]:
    return {
        "num_virtual_tokens": length,
        "token_dim": token_dim,
        "num_layers": pretrained.model.config.layers,
        "num_transformer_submodules": 1,
    }


def encoder_fields(encoder: Any) -> dict[str, Any]:
    """What the config says of the network that the rows came from; nothing where they are rows."""
    if isinstance(encoder, Mlp):
        hidden = encoder.layers[0]["bias"].shape[-1]
        return {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": hidden}
    if isinstance(encoder, Lstm):
        return {
            "encoder_reparameterization_type": "LSTM",
            "encoder_hidden_size": encoder.recurrent[0]["forward"]["recurrent"].shape[0],
            "encoder_num_layers": len(encoder.recurrent),
            "encoder_dropout": encoder.dropout,
        }
    return {}
