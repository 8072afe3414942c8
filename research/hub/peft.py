"""Adapters in the directory format of Hugging Face PEFT, both ways.

A directory holds adapter_config.json, whose `peft_type` says which kind of adapter it is, and
adapter_model.safetensors. A kind is two functions in a file of its own: `read` puts the tensors
around a model, `write` gives the config and the tensors of a model that has such an adapter.

    LORA            peft_lora       LoRA, rsLoRA (use_rslora), DoRA (use_dora)
    ADALORA         peft_adalora    AdaLoRA with the ranks that were allocated
    IA3             peft_ia3        (IA)^3
    PROMPT_TUNING   peft_prompts    a prompt's rows; read them with `prompt.before`, see there
    P_TUNING        peft_prompts    the same, of rows that came from a network
    PREFIX_TUNING   peft_prompts    a prefix; the model is a `Prefixed` then
"""

from __future__ import annotations

from pathlib import Path

import jax

from research.adapters import prefix
from research.hub import huggingface, peft_adalora, peft_ia3, peft_lora, peft_prompts
from research.hub.checkpoint import CheckpointError
from research.hub.peft_config import CONFIG, read_config
from research.hub.peft_modules import WEIGHTS, read_tensors
from research.hub.pretrained import Pretrained
from research.hub.replace import replacing
from research.models.decoder import Decoder
from research.paths import named_leaves
from research.types import Params
from research.weights.adalora import AdaLoRA
from research.weights.base import is_weight
from research.weights.dora import DoRA
from research.weights.ia3 import ScaledInput, ScaledOutput
from research.weights.lora import LoRA
from research.weights.prompt import Prompt

READERS = {
    "LORA": peft_lora.read,
    "ADALORA": peft_adalora.read,
    "IA3": peft_ia3.read,
    "PROMPT_TUNING": peft_prompts.read,
    "P_TUNING": peft_prompts.read,
    "PREFIX_TUNING": peft_prompts.read_prefix,
}
# The first kind that a model has is written; what it has beside that one is refused.
WRITERS = {
    LoRA: peft_lora.write,
    DoRA: peft_lora.write_dora,
    AdaLoRA: peft_adalora.write,
    ScaledOutput: peft_ia3.write,
    ScaledInput: peft_ia3.write,
    Prompt: peft_prompts.write,
}


def load_adapter(pretrained: Pretrained, directory: str | Path) -> Pretrained:
    """The model with a PEFT adapter in it (its numbers float32).

    A prompt's rows are read where its ids stand: `loaded.logits(prompt.before(loaded.params, [ids]))`.

    Raises CheckpointError when a file is missing or damaged, the adapter is of a kind or has an
    option that is not supported, or its names or shapes do not fit the model.
    """
    directory = Path(directory)
    config = read_config(directory)
    tensors = read_tensors(directory / WEIGHTS)
    return READERS[config["peft_type"]](pretrained, directory / WEIGHTS, config, tensors)


def save_adapter(directory: str | Path, pretrained: Pretrained) -> None:
    """Write the adapter of a model, and nothing else of it, as PEFT does.

    An existing adapter directory is replaced as a whole or not at all. Raises CheckpointError when
    the model has no adapter, or one that PEFT's format cannot express, or two kinds of them.
    """
    leaves = [leaf for _, leaf in named_leaves(pretrained.params, is_leaf=is_weight)]
    writers = [w for kind, w in WRITERS.items() if any(isinstance(leaf, kind) for leaf in leaves)]
    if "prefix" in pretrained.params:
        writers.append(peft_prompts.write_prefix)
    if not writers:
        kinds = ", ".join(kind.__name__ for kind in WRITERS)
        raise CheckpointError(
            f"{directory}: the model has no adapter to save: none of {kinds} and no prefix"
        )
    config, tensors = writers[0](directory, pretrained)
    with replacing(directory, marker=CONFIG) as partial:
        huggingface.write_json(partial / CONFIG, config)
        huggingface.write_tensors(partial / WEIGHTS, tensors)


def without_adapter(model: Decoder, params: Params) -> tuple[Decoder, Params]:
    """The model and parameters that an adapter was loaded onto; the same arrays, not copies."""
    if "prefix" in params:
        return prefix.remove(model, params)
    kinds = tuple(WRITERS)
    bases = jax.tree.map(lambda w: w.base if isinstance(w, kinds) else w, params, is_leaf=is_weight)
    return model, bases
