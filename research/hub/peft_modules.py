"""Adapters that stand on matrices: their modules and tensors in PEFT's directories, both ways.

PEFT keeps some tensors for every adapted module of every layer, 'model.layers.3.self_attn.q_proj.'
and a suffix; a Weight here holds those of all layers, stacked. A kind of adapter says which suffixes
a module has and of which shapes (`Parts`), and how the layers' tensors become a Weight.

A tensor that packs several of our matrices (GPT-2's c_attn, ChatGLM's query_key_value) is one module
to PEFT, whose adapter all parts share; ours have their own. Both ways it is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.hub import huggingface
from research.hub.checkpoint import CheckpointError
from research.hub.pretrained import Pretrained
from research.models import families
from research.models.families.checkpoint import Entry
from research.paths import map_named, named_leaves
from research.weights.base import Weight, dense, is_weight

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TIED = (
    "the embedding table is tied to the head: PEFT would adapt the embedding alone, here the "
    "head changes with it"
)
# {suffix of a tensor's name: its shape}; a letter is a size that may be any, but the same in all.
Parts = Mapping[str, tuple[int | str, ...]]
Found = dict[str, np.ndarray] | None  # one layer's tensors by suffix; None for a layer left out


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A matrix of the model. leaf: what stands there; shape: the matrix's, [in, out] or [L, in, out]."""

    path: str
    entry: Entry
    leaf: Any
    shape: tuple[int, ...]

    @property
    def layers(self) -> list[int | None]:
        """The layers of a stack; [None] for a matrix that is not stacked."""
        return list(range(self.shape[0])) if self.entry.stacked else [None]

    @property
    def is_table(self) -> bool:
        return self.path.endswith("/table")

    def module(self, layer: int | None = None) -> str:
        """PEFT's name: 'model.layers.3.self_attn.q_proj', with '{layer}' for all of a stack."""
        return self.entry.name_of(layer).removesuffix(".weight")


def sites(pretrained: Pretrained) -> dict[str, Site]:
    """{path: site} of all matrices that the family has names for, parts of packed tensors too."""
    leaves = dict(named_leaves(pretrained.params, is_leaf=is_weight))
    entries = families.find(pretrained.config).name_map(pretrained.model.config)
    return {
        e.path: Site(e.path, e, leaves[e.path], matrix_shape(leaves[e.path]))
        for e in entries
        if e.path.endswith(("/kernel", "/table")) and e.path in leaves
    }


def matrix_shape(leaf: Any) -> tuple[int, ...]:
    while hasattr(leaf, "base"):
        leaf = leaf.base
    return jax.eval_shape(dense, leaf).shape


def adaptable(pretrained: Pretrained) -> list[Site]:
    """Where an adapter may stand: on no matrix that is a part of a tensor."""
    return [site for site in sites(pretrained).values() if site.entry.columns is None]


# In.


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


def put_on(
    pretrained: Pretrained,
    file: Path,
    tensors: dict[str, np.ndarray],
    parts: Callable[[Site, int | None], Parts],
    build: Callable[[Site, list[Found]], Weight],
) -> Pretrained:
    """The model with `build(site, tensors of each layer)` on every matrix that `tensors` adapts.

    CheckpointError naming a tensor without its companions, of another shape than the base's matrix
    asks for, on a packed tensor, or without a place in the model.
    """
    refuse_packed(file, pretrained, tensors)
    here, made = adaptable(pretrained), {}
    for site in here:
        found = [take(file, site, layer, parts(site, layer), tensors) for layer in site.layers]
        if any(one is not None for one in found):
            if site.is_table and pretrained.model.config.head is None:
                raise CheckpointError(f"{file}: {TIED}")
            made[site.path] = build(site, found)
    drop_copies_of_base(file, here, tensors)
    if tensors or not made:
        odd = ", ".join(sorted(tensors)[:8]) or "nothing at all"
        raise CheckpointError(
            f"{file}: holds what has no place in the model: {odd}; modules of this base are like "
            f"{here[-1].module(here[-1].layers[0])}"
        )
    params = map_named(
        lambda path, leaf: made.get(path, leaf), pretrained.params, is_leaf=is_weight
    )
    return dataclasses.replace(pretrained, params=params)


def take(
    file: Path, site: Site, layer: int | None, parts: Parts, tensors: dict[str, np.ndarray]
) -> Found:
    """The tensors of one module, which leave `tensors`; None when it has none."""
    names = {suffix: f"{site.module(layer)}.{suffix}" for suffix in parts}
    here = [name for name in names.values() if name in tensors]
    lacking = [name for name in names.values() if name not in tensors]
    if not here:
        return None
    if lacking:
        raise CheckpointError(f"{file}: holds {here[0]} but not {lacking[0]}")
    found = {suffix: tensors.pop(name) for suffix, name in names.items()}
    require_shapes(file, names, found, parts)
    return found


def require_shapes(
    file: Path, names: dict[str, str], found: dict[str, np.ndarray], parts: Parts
) -> None:
    sizes: dict[int | str, int] = {}
    for suffix, shape in parts.items():
        for letter, size in zip(shape, found[suffix].shape, strict=False):
            if isinstance(letter, str):
                sizes.setdefault(letter, size)
    wanted = {s: tuple(sizes.get(size, size) for size in shape) for s, shape in parts.items()}
    if any(found[suffix].shape != shape for suffix, shape in wanted.items()):
        held = " and ".join(f"{names[s]} {list(array.shape)}" for s, array in found.items())
        expected = " and ".join(f"[{', '.join(map(str, shape))}]" for shape in parts.values())
        raise CheckpointError(f"{file}: {held}; expected {expected} on this base")


def refuse_packed(file: Path, pretrained: Pretrained, tensors: dict[str, np.ndarray]) -> None:
    """CheckpointError naming an adapter's tensor that stands on a packed tensor."""
    parts: dict[str, list[str]] = {}
    for site in sites(pretrained).values():
        for layer in site.layers if site.entry.columns is not None else []:
            parts.setdefault(site.module(layer), []).append(site.path)
    for name in sorted(tensors):
        for module, paths in parts.items():
            if name.startswith(f"{module}."):
                raise CheckpointError(
                    f"{file}: {name} adapts a tensor that is {', '.join(paths)} here: "
                    "not implemented"
                )


def drop_copies_of_base(file: Path, here: Iterable[Site], tensors: dict[str, np.ndarray]) -> None:
    """PEFT writes adapted embeddings and heads out too: fine when they are those of the model."""
    for site in here:
        name = f"{site.module()}.base_layer.weight"
        if site.entry.stacked or name not in tensors:
            continue
        ours = np.asarray(dense(site.leaf), np.float32)
        theirs = tensors.pop(name).astype(np.float32)
        theirs = theirs.T if site.entry.transpose else theirs
        if theirs.shape != ours.shape or not np.allclose(theirs, ours, rtol=1e-2, atol=1e-6):
            raise CheckpointError(
                f"{file}: {name} is not the matrix of this model: the adapter was "
                "trained on another base"
            )


# Out.


def adapted(directory: Any, pretrained: Pretrained, method: str, *kinds: type) -> list[Site]:
    """The matrices on which a Weight of `kinds` stands, when nothing else would be lost.

    method: what the error calls them. CheckpointError naming the path of what PEFT's format cannot
    hold beside them, or under them.
    """
    refuse_others(directory, pretrained, method, kinds)
    known, found = sites(pretrained), []
    for path, node in named_leaves(pretrained.params, is_leaf=is_weight):
        if not isinstance(node, kinds):
            continue
        if known[path].entry.columns is not None:
            raise CheckpointError(
                f"{directory}: {path} is a part of the tensor {known[path].entry.name}, which PEFT "
                "adapts as a whole: merge the adapter and save the model"
            )
        refuse_under(directory, path, method, node)
        found.append(known[path])
    return found


def refuse_under(directory: Any, path: str, method: str, node: Any) -> None:
    """CheckpointError when what `node` stands on is an adapter too."""
    if hasattr(node.base, "base"):
        under = type(node.base).__name__
        raise CheckpointError(
            f"{directory}: {path} has a {method} on a {under}: merge or remove one first"
        )


def refuse_others(
    directory: Any, pretrained: Pretrained, method: str, kinds: tuple[type, ...]
) -> None:
    """What was added beside `kinds` and would be lost: other Weights, leaves of no checkpoint."""
    config = pretrained.model.config
    names = {entry.path for entry in families.find(pretrained.config).name_map(config)}
    for path, leaf in named_leaves(pretrained.params, is_leaf=is_weight):
        if hasattr(leaf, "base") and not isinstance(leaf, kinds):
            raise CheckpointError(
                f"{directory}: {path} holds a {type(leaf).__name__}, which is not written beside "
                f"{method}: merge or remove it first"
            )
        if path not in names:
            raise CheckpointError(
                f"{directory}: {path} is no part of the base model and is not written beside "
                f"{method}: remove it first"
            )


def tensors_to_save(
    here: Iterable[Site], parts: Callable[[Site, Any], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """{PEFT's name: array} of `parts(site, one layer's Weight without its base)`."""
    tensors = {}
    for site in here:
        node = jax.tree.map(np.asarray, site.leaf.replace(base=None))
        for layer in site.layers:
            own = node if layer is None else jax.tree.map(lambda x, at=layer: x[at], node)
            for suffix, array in parts(site, own).items():
                name = f"{PREFIX}{site.module(layer)}.{suffix}"
                tensors[name] = np.ascontiguousarray(array)
    return tensors


def require_even(directory: Any, here: Iterable[Site], word: str, of: Callable[[Any], Any]) -> None:
    """What is written names a module in all its layers: `of` the Weights there must agree."""
    found: dict[str, tuple[str, Any]] = {}
    for site in here:
        mine = of(site.leaf)
        other, there = found.setdefault(site.module(), (site.path, mine))
        if mine != there:
            raise CheckpointError(
                f"{directory}: {other} and {site.path} are layers of one module to PEFT, but {word} "
                f"is {there} and {mine}"
            )


def short_names(pretrained: Pretrained, here: Iterable[Site]) -> dict[str, str]:
    """{path: how adapter_config.json calls the module}, the same for all layers."""
    modules = [site.module() for site in sites(pretrained).values()]
    return {site.path: short_name(site.module(), modules) for site in here}


def short_name(module: str, others: Iterable[str]) -> str:
    """The fewest last words that no other module ends with: 'q_proj'."""
    words = module.split(".")
    for count in range(1, len(words)):
        end = ".".join(words[-count:])
        if not any(other.endswith(end) for other in others if other != module):
            return end
    return module
