"""A model with its parameters, tokenizer and config: loaded from a file or directory, saved to one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from research.hub import huggingface
from research.hub.assemble import assemble, disassemble
from research.hub.checkpoint import Checkpoint, CheckpointError
from research.hub.config_fields import require_fields
from research.hub.gguf import open_gguf
from research.hub.gguf_tokenizer import tokenizer_of
from research.hub.quantized_directory import open_directory
from research.hub.replace import left_behind, replacing
from research.models import families
from research.models.decoder import Decoder, axes, head_size, init
from research.models.families.checkpoint import ConfigError
from research.tokenize.tokenizer import Tokenizer
from research.tokenize.tokenizer_files import VOCABULARIES
from research.train.sharding import shardings
from research.types import Array, Params
from research.weights.base import leaf_axes

MAX_SHARD_BYTES = 2 * 1000**3
# What older versions of transformers wrote, said again by rope_parameters and dtype.
OLD_FIELDS = (
    "rope_theta",
    "rope_scaling",
    "original_max_position_embeddings",
    "torch_dtype",
)


@dataclass(frozen=True, eq=False)
class Pretrained:
    """config: the dictionary of a Hugging Face config.json, whatever the file was.

    tokenizer is None for a directory without tokenizer files. generation: the dictionary of
    generation_config.json, empty when there is none.
    """

    model: Decoder
    params: Params
    tokenizer: Tokenizer | None
    config: dict[str, Any]
    generation: dict[str, Any] = field(default_factory=dict)

    def logits(self, tokens: Any) -> Array:
        """Token ids [B, T] (or [T], as one row) -> logits [B, T, V] float32.

        ValueError naming the row whose tokens lack what says where they stand (ChatGLM-6B).
        """
        tokens = jnp.atleast_2d(jnp.asarray(tokens, jnp.int32))
        for row, ids in enumerate(tokens.tolist()):
            if (lack := self.model.config.position.missing(ids)) is not None:
                raise ValueError(f"row {row} {lack}")
        return _logits(self.model, self.params, tokens)


@partial(jax.jit, static_argnums=0)
def _logits(model: Decoder, params: Params, tokens: Array) -> Array:
    return model.apply({"params": params}, tokens)


def load(
    path: str | Path, dtype: Any = jnp.float32, mesh: Mesh | None = None, blocks: bool = False
) -> Pretrained:
    """A model from a Hugging Face directory or a .gguf file, parameters in `dtype`.

    With `blocks`, Q4_0, Q4_1 and Q8_0 tensors of a .gguf stay in few bits (`quantized_gguf`). Those of
    a quantized directory always do. What cannot, because the layers of a stack differ, is printed
    and dense.

    With a `mesh` (`train.sharding.make_mesh`) each parameter is read straight into its shards, one
    shard at a time, and heads stay whole; axes that the mesh does not divide are printed and
    replicated. (A model with matrices in few bits is made whole on the host first.)

    Raises CheckpointError (or TokenizerError) naming the file and what is wrong with it, and
    ShardingError for a mesh of other axes, before any parameter is allocated.
    """
    path = Path(path)
    if path.is_dir():
        if blocks:
            raise CheckpointError(f"{path} is a directory: only .gguf files have blocks to keep")
        checkpoint = open_directory(path)
        tokenizer, generation = read_tokenizer(path), read_generation(path)
    elif path.exists() or path.suffix == ".gguf":
        checkpoint, metadata = open_gguf(path, blocks)
        tokenizer, generation = tokenizer_of(path, metadata), {}
    else:
        kept = [str(p) for p in left_behind(path)]
        hint = f"; a killed save left {kept}, which the next save puts back" if kept else ""
        raise CheckpointError(f"{path}: there is no such file or directory{hint}")
    if tokenizer is not None:
        _require_fit(path, checkpoint.config, tokenizer)
    model, params = build(checkpoint, dtype, mesh)
    return Pretrained(model, params, tokenizer, checkpoint.config, generation)


def _require_fit(path: Path, config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """CheckpointError when the model has fewer rows than the tokenizer ids, or other ids.

    The ids are looked at where positions hang on the start token (ChatGLM-6B); the first upload of
    that model has all of them moved by 20,000.
    """
    rows, start = config.get("vocab_size"), config.get("bos_token_id")
    if isinstance(rows, int) and tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {rows}"
        )
    if config.get("position_encoding_2d") and tokenizer.bos_id not in (None, start):
        raise CheckpointError(
            f"{path}: config.json has bos_token_id {start}, the tokenizer {tokenizer.bos_id} "
            f"({tokenizer.id_to_token(tokenizer.bos_id)!r})"
        )


def build(checkpoint: Checkpoint, dtype: Any, mesh: Mesh | None = None) -> tuple[Decoder, Params]:
    """The model that a checkpoint's config describes and its parameters.

    CheckpointError, naming file and field, for a config that is ill-typed or contradicts itself.
    """
    family, model, shapes = describe(checkpoint)
    names = family.name_map(model.config)
    if mesh is None:
        return model, assemble(checkpoint, names, shapes, dtype)
    if checkpoint.coded:  # small enough to be made whole, and placed then
        params = assemble(checkpoint, names, shapes, dtype)
        return model, jax.device_put(params, _homes(model, params, mesh))
    return model, assemble(checkpoint, names, shapes, dtype, _homes(model, shapes, mesh))


def _homes(model: Decoder, params: Params, mesh: Mesh) -> Params:
    """Where each leaf lives on a mesh; axes that it does not divide are printed."""
    units = dict.fromkeys(("heads", "kv_heads"), head_size(model.config))
    homes, notes = shardings(leaf_axes(params, axes(model)), params, mesh, units=units)
    for note in notes:
        print(note, flush=True)
    return homes


def describe(checkpoint: Checkpoint) -> tuple[ModuleType, Decoder, Params]:
    """The family, the model, and the shapes of its parameters, from the config alone."""
    try:
        require_fields(checkpoint.config)
        family, config = families.read(checkpoint.config)
        model = Decoder(config)
        return family, model, jax.eval_shape(lambda: init(model, jax.random.key(0)))
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{checkpoint.path}: config.json lacks the field {error}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: config.json describes no model: {error}"
        ) from error


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """The directory's tokenizer; None when it holds no tokenizer file at all."""
    if not any((directory / name).exists() for name in VOCABULARIES):
        return None
    return Tokenizer.from_directory(directory)


def read_generation(directory: Path) -> dict[str, Any]:
    file = directory / huggingface.GENERATION
    return huggingface.read_json(file) if file.exists() else {}


def save(
    directory: str | Path, pretrained: Pretrained, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a directory that `transformers` and `load` open, Weights merged, dtypes kept.

    An existing model directory is replaced when everything is written, and unchanged when
    anything fails. Raises CheckpointError then, and when the family has no name for a parameter.
    """
    family = families.find(pretrained.config)
    specs, tensors = disassemble(family.name_map(pretrained.model.config), pretrained.params)
    config = config_to_save(pretrained, family) | {"dtype": next(iter(specs.values()))[1].name}
    write(directory, pretrained, config, specs, tensors, max_shard_bytes)


def write(
    directory: str | Path,
    pretrained: Pretrained,
    config: dict[str, Any],
    specs: dict[str, tuple[tuple[int, ...], np.dtype]],
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int,
) -> None:
    """A directory of these tensors (`write_weights`) and this config; errors as in `save`."""
    with replacing(directory, marker=huggingface.CONFIG) as partial_directory:
        huggingface.write_json(partial_directory / huggingface.CONFIG, config)
        huggingface.write_weights(partial_directory, specs, tensors, max_shard_bytes)
        if pretrained.tokenizer is not None:
            pretrained.tokenizer.save(partial_directory)
        generation = generation_to_save(pretrained, config)
        huggingface.write_json(partial_directory / huggingface.GENERATION, generation)


def config_to_save(pretrained: Pretrained, family: ModuleType) -> dict[str, Any]:
    """The config as loaded, except where the model itself says otherwise."""
    kept = {name: value for name, value in pretrained.config.items() if name not in OLD_FIELDS}
    config = kept | family.to_huggingface(pretrained.model.config)
    if pretrained.tokenizer is not None:
        for name in ("bos", "eos", "pad"):
            config.setdefault(f"{name}_token_id", getattr(pretrained.tokenizer, f"{name}_id"))
    return config


def generation_to_save(pretrained: Pretrained, config: dict[str, Any]) -> dict[str, Any]:
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {name: config[name] for name in ids if config.get(name) is not None}
    if pretrained.tokenizer is not None and len(pretrained.tokenizer.stop_ids) > 1:
        generation["eos_token_id"] = list(pretrained.tokenizer.stop_ids)
    return generation | pretrained.generation
