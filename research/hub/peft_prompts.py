"""Prompt tuning and P-tuning in PEFT's directories.

Both have one tensor, prompt_embeddings [P, D]: the rows that stand before the text. P-tuning's
network has done its work by then, so it is not saved, and its rows come back as a plain prompt.

PEFT puts the rows before every text by itself. Here they are the ids after the vocabulary's, so that
a text is given with them:

    loaded = hub.load_adapter(base, directory)
    loaded.logits(prompt.before(loaded.params, [ids]))            # [1, P + T, V], as PEFT's
    generate(loaded.model, loaded.params, prompt.before(loaded.params, texts), rng)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.hub.checkpoint import CheckpointError
from research.hub.peft_config import fields_to_save
from research.hub.peft_modules import refuse_others, refuse_under
from research.hub.pretrained import Pretrained
from research.paths import map_named, named_leaves
from research.weights.base import is_weight
from research.weights.prompt import Prompt
from research.weights.prompt_encoder import Lstm, Mlp

ROWS = "prompt_embeddings"
TABLE = "embed/table"


def read(
    pretrained: Pretrained, file: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> Pretrained:
    """The model whose embedding table has the rows of a directory below its own."""
    width = pretrained.model.config.width
    rows = jnp.asarray(take_rows(file, config, tensors, width), jnp.float32)
    params = map_named(
        lambda path, leaf: Prompt(leaf, rows) if path == TABLE else leaf,
        pretrained.params,
        is_leaf=is_weight,
    )
    return dataclasses.replace(pretrained, params=params)


def take_rows(
    file: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], width: int
) -> np.ndarray:
    """prompt_embeddings [num_virtual_tokens, width], when there is nothing else."""
    if tensors.keys() != {ROWS}:
        raise CheckpointError(f"{file}: holds {sorted(tensors)[:8]}; expected {ROWS} alone")
    expected = (config["num_virtual_tokens"], width)
    if tensors[ROWS].shape != expected:
        raise CheckpointError(
            f"{file}: {ROWS} {list(tensors[ROWS].shape)}; expected {list(expected)}, the virtual "
            "tokens of adapter_config.json and the width of this base"
        )
    return tensors[ROWS]


def write(directory: Any, pretrained: Pretrained) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """adapter_config.json and the tensor of a model with a prompt."""
    refuse_others(directory, pretrained, "prompt", (Prompt,))
    leaves = dict(named_leaves(pretrained.params, is_leaf=is_weight))
    node = leaves[TABLE]
    refuse_under(directory, TABLE, "prompt", node)
    config = fields_to_save(
        "P_TUNING" if isinstance(node.prompt, Mlp | Lstm) else "PROMPT_TUNING",
        **encoder_fields(node.prompt),
        num_virtual_tokens=node.length,
        token_dim=pretrained.model.config.width,
        num_layers=pretrained.model.config.layers,
        num_transformer_submodules=1,
    )
    return config, {ROWS: np.ascontiguousarray(node.rows())}


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
