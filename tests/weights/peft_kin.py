"""What peft computed (scripts/references/peft_lora_kin.py), by our paths and in our shapes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from research import hub
from research.paths import map_named

TESTS = Path(__file__).parents[1]
TENSORS = load_file(TESTS / "weights/fixtures/peft_lora_kin.safetensors")
BASE = hub.load(TESTS / "hub/fixtures/tiny_llama/gqa")
PROMPTS = [[1, 5, 9, 3, 60, 22, 47, 8], [4, 61, 4, 19, 33]]
Q, DOWN = "stack_0/block_0/attention/q/kernel", "stack_0/block_0/ffn/down/kernel"
MODULES = {
    Q: "model.layers.{}.self_attn.q_proj",
    DOWN: "model.layers.{}.mlp.down_proj",
    "embed/table": "model.embed_tokens",
    "head/kernel": "lm_head",
}
LINEAR = f"{Q}|{DOWN}"


def tensor(case, kind, path, tail):
    """Ours is stacked over layers, and its matrices are transposed."""
    name = f"{case}.{kind}.base_model.model.{MODULES[path]}.{tail}"
    if "{}" not in name:
        return TENSORS[name].T
    return np.stack([TENSORS[name.format(layer)].T for layer in (0, 1)])


def factors(case, kind, path):
    """{field: array} of a LoRA, or what is known of its gradient."""
    tails = "lora_{}.default.weight"
    if path.endswith("/table"):
        tails = "lora_embedding_{}.default"
    return {field: tensor(case, kind, path, tails.format(field.upper())) for field in "ab"}


def put(nodes):
    """The tiny model's parameters with other nodes at some paths."""
    return map_named(lambda path, leaf: nodes.get(path, leaf), BASE.params)


@jax.jit
def losses(params):
    """(the sum over prompts of the mean next-token loss, logits of each)."""
    total, found = 0.0, []
    for ids in map(jnp.asarray, PROMPTS):
        logits = BASE.model.apply({"params": params}, ids[None])[0]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), ids[1:, None], axis=-1)
        total -= picked.mean()
        found.append(logits)
    return total, found


gradients = jax.jit(jax.grad(losses, has_aux=True))


def check_logits(case, logits):
    for number, ours in enumerate(logits):
        np.testing.assert_allclose(ours, TENSORS[f"{case}.logits.{number}"], rtol=1e-5, atol=1e-5)


def close(ours, theirs, message="", tolerance=1e-5):
    """To a fraction of the largest entry."""
    scale = max(np.abs(theirs).max(), 1e-3)
    np.testing.assert_allclose(
        ours / scale, theirs / scale, rtol=0, atol=tolerance, err_msg=message
    )
