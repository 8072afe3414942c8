"""What the tests of tuning methods share: peft's names, its loss, forms of a model, a few steps."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from research import hub
from research.models import decoder
from research.objectives import next_token
from research.paths import named_leaves
from research.train.optim import AdamW, optimizer
from research.train.partition import combine, partition
from research.train.state import initial_state
from research.train.step import make_step

HERE = Path(__file__).parent
PARTS = {"self_attn": "attention", "mlp": "ffn"}


def peft_numbers(name):
    return load_file(HERE / "fixtures" / f"{name}.safetensors")


def hub_model(folder):
    """(model, params, prompts) of a committed tiny model."""
    path = HERE.parent / "hub" / "fixtures" / folder
    loaded = hub.load(path)
    return loaded.model, loaded.params, json.loads((path / "prompts.json").read_text())


def path_of(module):
    """The path of the kernel of 'k_proj' or 'down_proj'."""
    short = module.removesuffix("_proj")
    return f"stack_0/block_0/{'ffn' if short in ('gate', 'up', 'down') else 'attention'}/{short}/kernel"


def mean_nll(model, prompts):
    """params -> the sum over prompts of the mean next-token negative log-likelihood."""
    objective = next_token(model, fused=False)

    def loss(params):
        total = 0.0
        for ids in prompts:
            tokens = jnp.asarray(ids)[None]
            weights = jnp.full((1, len(ids) - 1), 1 / (len(ids) - 1))
            batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
            total += objective(params, None, batch, None)[0]
        return total

    return loss


def logits(model, params, tokens):
    return jax.jit(lambda params: model.apply({"params": params}, tokens))(params)


def forms(model, params, tokens):
    """{form: logits}: the layers scanned, looped over, apart, and forgotten for the backward pass."""
    loop = decoder.Decoder(dataclasses.replace(model.config, scan=False))
    remat = decoder.Decoder(dataclasses.replace(model.config, remat="full"))
    return {
        "scan": logits(model, params, tokens),
        "loop": logits(loop, params, tokens),
        "apart": logits(model, decoder.unstack(params), tokens),
        "remat": logits(remat, params, tokens),
    }


def check_only_these_train(model, params, rule, prompts, key, trained):
    """Three steps lower the loss; leaves whose path ends with `trained` move, others not a bit."""
    before = {name: np.array(leaf, copy=True) for name, leaf in named_leaves(params)}
    trainable, frozen = partition(params, rule)
    update = optimizer(AdamW(0.05), trainable)
    loss = mean_nll(model, prompts)
    step = make_step(lambda params, *rest: (loss(params), {}), update)
    state, losses = initial_state(trainable, update, jax.random.clone(key)), []
    for _ in range(3):
        state, metrics = step(state, frozen, None, {"tokens": np.zeros((1, 1), np.int32)})
        losses.append(float(metrics["loss"].total))
    after = dict(named_leaves(combine(state.trainable, frozen)))
    assert losses[-1] < losses[0]
    assert {n for n in before if not np.array_equal(before[n], after[n])} == {
        n for n in before if n.endswith(trained)
    }
