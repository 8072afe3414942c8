"""LoRA adapters in the directory format of Hugging Face PEFT, both ways.

A directory holds adapter_config.json and adapter_model.safetensors, in which every adapted module
has two matrices: lora_A.weight [R, in] and lora_B.weight [out, R], the transposes of our a [in, R]
and b [R, out] (for an embedding lora_embedding_A [R, V] and lora_embedding_B [D, R]).

Ours are stacked over layers and have one scale for all. An adapter whose rank or alpha differs
between layers is read exactly by padding ranks with zeros and folding the ratio of scales into b;
a layer that it leaves out gets zeros.

A tensor that packs several of our matrices (GPT-2's c_attn, ChatGLM's query_key_value) is one module
to PEFT, whose factors all parts share; ours have factors of their own. Both ways it is refused.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.hub import huggingface
from research.hub.checkpoint import CheckpointError
from research.hub.peft_config import CONFIG, config_to_save, module_of, read_config, scale_of
from research.hub.pretrained import Pretrained
from research.hub.replace import replacing
from research.models import families
from research.models.families.checkpoint import Entry
from research.paths import map_named, named_leaves
from research.weights.base import dense, is_weight
from research.weights.lora import LoRA
from research.weights.transposed import Transposed

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TIED = (
    "the embedding table is tied to the head: PEFT would adapt the embedding alone, here the "
    "head changes with it"
)


def load_adapter(pretrained: Pretrained, directory: str | Path) -> Pretrained:
    """The model with a PEFT LoRA adapter around its matrices (factors float32).

    Raises CheckpointError when a file is missing or damaged, the adapter is of another kind, or
    its names or shapes do not fit the model.
    """
    directory = Path(directory)
    config = read_config(directory)
    tensors = read_tensors(directory / WEIGHTS)
    entries = adaptable(pretrained)
    refuse_packed(directory, pretrained, tensors)
    leaves = dict(named_leaves(pretrained.params, is_leaf=is_weight))
    shapes = {path: jax.eval_shape(dense, leaves[path]).shape for path in entries}
    found: dict[str, LoRA] = {}
    for path, entry in entries.items():
        factors = take_factors(directory, entry, shapes[path], tensors)
        if any(pair is not None for pair in factors):
            if path == "embed/table" and pretrained.model.config.head is None:
                raise CheckpointError(f"{directory}: {TIED}")
            found[path] = stack(leaves[path], entry, shapes[path], factors, config)
    drop_copies_of_base(directory, entries, leaves, tensors)
    if tensors or not found:
        odd = ", ".join(sorted(tensors)[:8]) or "nothing at all"
        raise CheckpointError(f"{directory / WEIGHTS}: holds what has no place in the model: {odd}")
    params = map_named(
        lambda path, leaf: found.get(path, leaf), pretrained.params, is_leaf=is_weight
    )
    return dataclasses.replace(pretrained, params=params)


def adaptable(pretrained: Pretrained) -> dict[str, Entry]:
    """{path: entry} of the matrices that an adapter may stand on: none that is part of a tensor."""
    return {path: e for path, e in matrices(pretrained).items() if e.columns is None}


def matrices(pretrained: Pretrained) -> dict[str, Entry]:
    """{path: entry} of all matrices, parts of packed tensors among them."""
    entries = families.find(pretrained.config).name_map(pretrained.model.config)
    return {e.path: e for e in entries if e.path.endswith(("/kernel", "/table"))}


def refuse_packed(directory: Path, pretrained: Pretrained, tensors: dict[str, np.ndarray]) -> None:
    """CheckpointError naming an adapter's factor that stands on a packed tensor."""
    packed = {path: e for path, e in matrices(pretrained).items() if e.columns is not None}
    parts: dict[str, list[str]] = {}
    for path, entry in packed.items():
        for layer in range(pretrained.model.config.layers):
            parts.setdefault(factor_names(entry, layer)[0], []).append(path)
    found = sorted(parts.keys() & tensors.keys())
    if found:
        raise CheckpointError(
            f"{directory / WEIGHTS}: {found[0]} adapts a tensor that is "
            f"{', '.join(parts[found[0]])} here: not implemented"
        )


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """{name without PEFT's prefix: array}."""
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such file")
    found = {}
    with huggingface.opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a mapping)
            huggingface.require_float(file, name, tensors)
            found[name.removeprefix(PREFIX)] = tensors.get_tensor(name)
    return found


def factor_names(entry: Entry, layer: int | None) -> tuple[str, str]:
    kind = "lora_embedding_{}" if entry.path.endswith("/table") else "lora_{}.weight"
    stem = module_of(entry, layer)
    return f"{stem}.{kind.format('A')}", f"{stem}.{kind.format('B')}"


def layers_of(entry: Entry, shape: tuple[int, ...]) -> list[int | None]:
    return list(range(shape[0])) if entry.stacked else [None]


def take_factors(
    directory: Path, entry: Entry, shape: tuple[int, ...], tensors: dict[str, np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray] | None]:
    """For every layer a [in, R] and b [R, out], or None; what is used leaves `tensors`."""
    pairs: list[tuple[np.ndarray, np.ndarray] | None] = []
    for layer in layers_of(entry, shape):
        names = factor_names(entry, layer)
        here = [name for name in names if name in tensors]
        if len(here) == 1:
            (other,) = set(names) - set(here)
            raise CheckpointError(f"{directory / WEIGHTS}: holds {here[0]} but not {other}")
        pairs.append(tuple(tensors.pop(name).T for name in names) if here else None)
        if here:
            a, b = pairs[-1]
            if (a.shape[0], b.shape[1], a.shape[1]) != (*shape[-2:], b.shape[0]):
                expected = f"[R, {shape[-2]}] and [{shape[-1]}, R]"
                raise CheckpointError(
                    f"{directory / WEIGHTS}: {names[0]} {list(a.T.shape)} and "
                    f"{names[1]} {list(b.T.shape)}; expected {expected}"
                )
    return pairs


def stack(
    base: Any,
    entry: Entry,
    shape: tuple[int, ...],
    pairs: list[tuple[np.ndarray, np.ndarray] | None],
    config: dict[str, Any],
) -> LoRA:
    """One LoRA from the factors of each layer."""
    rank = max(pair[0].shape[1] for pair in pairs if pair is not None)
    a = np.zeros((len(pairs), shape[-2], rank), np.float32)
    b = np.zeros((len(pairs), rank, shape[-1]), np.float32)
    scale = None
    for index, (layer, pair) in enumerate(zip(layers_of(entry, shape), pairs, strict=True)):
        if pair is None:
            continue
        own_rank = pair[0].shape[1]
        own_scale = scale_of(config, module_of(entry, layer), own_rank)
        scale = own_scale if scale is None else scale
        a[index, :, :own_rank] = pair[0]
        b[index, :own_rank] = pair[1].astype(np.float32) * (own_scale / scale)
    if not entry.stacked:
        a, b = a[0], b[0]
    dropout = float(config.get("lora_dropout") or 0.0)
    return LoRA(base, jnp.asarray(a), jnp.asarray(b), scale, dropout)


def drop_copies_of_base(
    directory: Path, entries: dict[str, Entry], leaves: dict[str, Any], tensors: dict[str, Any]
) -> None:
    """PEFT writes adapted embeddings and heads out too: fine when they are those of the model."""
    for path, entry in entries.items():
        name = f"{module_of(entry, 0)}.base_layer.weight"
        if entry.stacked or name not in tensors:
            continue
        ours = np.asarray(dense(leaves[path]), np.float32)
        theirs = tensors.pop(name).astype(np.float32)
        theirs = theirs.T if entry.transpose else theirs
        if theirs.shape != ours.shape or not np.allclose(theirs, ours, rtol=1e-2, atol=1e-6):
            raise CheckpointError(
                f"{directory / WEIGHTS}: {name} is not the matrix of this model: the adapter was "
                "trained on another base"
            )


def save_adapter(directory: str | Path, pretrained: Pretrained) -> None:
    """Write the LoRA factors of a model, and nothing else of it, as PEFT does.

    An existing adapter directory is replaced as a whole or not at all. Raises CheckpointError when
    the model has no LoRA, or one that PEFT's format cannot express.
    """
    entries = adaptable(pretrained)
    nodes = {
        path: node
        for path, node in named_leaves(pretrained.params, is_leaf=is_weight)
        if isinstance(node, LoRA)
    }
    require_expressible(directory, pretrained, entries, nodes)
    config = config_to_save(entries, nodes)
    tensors = {}
    for path, node in nodes.items():
        a, b = np.asarray(node.a), np.asarray(node.b)
        for layer in layers_of(entries[path], a.shape):
            factors = (a, b) if layer is None else (a[layer], b[layer])
            for name, factor in zip(factor_names(entries[path], layer), factors, strict=True):
                tensors[PREFIX + name] = np.ascontiguousarray(factor.T)
    with replacing(directory, marker=CONFIG) as partial:
        huggingface.write_json(partial / CONFIG, config)
        huggingface.write_tensors(partial / WEIGHTS, tensors)


def require_expressible(
    directory: Any, pretrained: Pretrained, entries: dict[str, Entry], nodes: dict[str, LoRA]
) -> None:
    if not nodes:
        raise CheckpointError(f"{directory}: the model has no LoRA to save")
    refuse_others(directory, pretrained)
    known = matrices(pretrained)
    for path, node in nodes.items():
        if path in known and path not in entries:
            raise CheckpointError(
                f"{directory}: {path} is a part of the tensor {known[path].name}, which PEFT adapts "
                "as a whole: merge the adapter and save the model"
            )
        if path not in entries:
            raise CheckpointError(f"{directory}: the family has no name for the matrix {path}")
        if isinstance(node.base, LoRA):
            raise CheckpointError(f"{directory}: {path} has a LoRA on a LoRA: merge one first")
        if node.residual:
            raise CheckpointError(
                f"{directory}: {path} has a base that its LoRA's beginning changed (PiSSA, OLoRA): "
                "save what `lora.on_original` makes of it"
            )
    if "embed/table" in nodes and pretrained.model.config.head is None:
        raise CheckpointError(f"{directory}: {TIED}")
    if len({node.dropout for node in nodes.values()}) > 1:
        raise CheckpointError(f"{directory}: dropout differs between matrices; PEFT has one")
    require_one_scale(directory, entries, nodes)


def refuse_others(directory: Any, pretrained: Pretrained) -> None:
    """What was added beside the LoRAs and would be lost: other Weights, and leaves of no checkpoint."""
    config = pretrained.model.config
    names = {entry.path for entry in families.find(pretrained.config).name_map(config)}
    for path, leaf in named_leaves(pretrained.params, is_leaf=is_weight):
        if is_weight(leaf) and not isinstance(leaf, LoRA | Transposed):
            kind = type(leaf).__name__
            raise CheckpointError(
                f"{directory}: {path} holds a {kind}, which is not written beside LoRA: merge or "
                "remove it first"
            )
        if path not in names:
            raise CheckpointError(
                f"{directory}: {path} is no part of the base model and is not written beside LoRA: "
                "remove it first"
            )


def require_one_scale(directory: Any, entries: dict[str, Entry], nodes: dict[str, LoRA]) -> None:
    """The patterns that are written name a module in all its layers: rank and scale must agree."""
    found: dict[str, tuple[str, tuple[int, float]]] = {}
    for path, node in nodes.items():
        here = (node.a.shape[-1], node.scale)
        other, there = found.setdefault(module_of(entries[path]), (path, here))
        if here != there:
            raise CheckpointError(
                f"{directory}: {other} and {path} are layers of one module to PEFT, but (rank, scale) "
                f"is {there} and {here}"
            )
