"""GGUF tensors kept in their blocks, against gguf's own dequantization of the same bytes."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_files import permute, write
from hub_reference import FIXTURES

from research import hub
from research.hub import CheckpointError
from research.hub.download import smollm2
from research.paths import named_leaves
from research.train.sharding import make_mesh
from research.weights import lora
from research.weights.base import is_weight, merge
from research.weights.formats import Integer
from research.weights.quantized import bits_per_parameter, is_quantized

WIDTH, FFN, LAYERS, VOCAB = 64, 96, 2, 32
METADATA = {
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": FFN,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.rope.freq_base": 1e4,
}
SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH // 2, WIDTH),
    "attn_v": (WIDTH // 2, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (FFN, WIDTH),
    "ffn_up": (FFN, WIDTH),
    "ffn_down": (WIDTH, FFN),
}
DOWN = "stack_0/block_0/ffn/down/kernel"
TOKENS = np.arange(24).reshape(2, 12)


def tensors(kind, change=None):
    """A tied model whose matrices are of `kind`; change: {name: other kind}."""
    rng, change = np.random.default_rng(0), change or {}
    found = {"output_norm.weight": np.ones(WIDTH, np.float32)}
    shapes = {"token_embd.weight": (VOCAB, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in SHAPES.items()}
        for norm in ("attn_norm", "ffn_norm"):
            found[f"blk.{layer}.{norm}.weight"] = np.ones(WIDTH, np.float32)
    for name, shape in shapes.items():
        array = rng.normal(0, 0.3, shape).astype(np.float32)
        heads = 2 if "attn_q" in name else 1 if "attn_k" in name else None
        array = array if heads is None else permute(array, heads)
        used = change.get(name, kind)
        found[name] = array if used is None else (gguf.quants.quantize(array, used), used)
    return found


def opened(tmp_path, found, **how):
    return hub.load(write(tmp_path / "model.gguf", found, **METADATA), **how)


def weights_of(params):
    return {name: w for name, w in named_leaves(params, is_leaf=is_weight) if is_weight(w)}


@pytest.mark.parametrize(
    "kind, bits", [(Type.Q4_0, 4.5), (Type.Q4_1, 5), (Type.Q8_0, 8.5)], ids=lambda x: str(x)
)
def test_values_are_those_of_gguf_and_take_no_more_bytes(tmp_path, kind, bits):
    found = tensors(kind)
    kept, plain = opened(tmp_path, found, blocks=True), opened(tmp_path, found)
    assert len(weights_of(kept.params)) == 8 and not weights_of(plain.params)
    jax.tree.map(np.testing.assert_array_equal, merge(kept.params), plain.params)
    down = np.stack([gguf.quants.dequantize(*found[f"blk.{i}.ffn_down.weight"]) for i in (0, 1)])
    np.testing.assert_array_equal(weights_of(kept.params)[DOWN].values(), down)
    assert bits_per_parameter(kept.params) == bits
    # The values are equal; products are summed in another order.
    np.testing.assert_allclose(kept.logits(TOKENS), plain.logits(TOKENS), rtol=0, atol=5e-5)


def test_any_bytes_with_finite_scales(tmp_path):
    """Scales below float16's least normal number, and codes at both ends."""
    found, rng = tensors(Type.Q4_1), np.random.default_rng(1)
    for kind, name in [(Type.Q4_1, "ffn_up"), (Type.Q8_0, "ffn_down"), (Type.Q4_0, "attn_v")]:
        rows, columns = SHAPES[name]
        blocks, (_, size) = rows * columns // 32, gguf.GGML_QUANT_SIZES[kind]
        for layer in range(LAYERS):
            data = rng.integers(0, 256, (blocks, size), np.uint8)
            scales = rng.choice([6e-8, -3e-5, 0.0, 65504.0, -1.5], (blocks, 2)).astype(np.float16)
            data[:, :2] = scales[:, :1].view(np.uint8)
            if kind is Type.Q4_1:
                data[:, :4] = scales.view(np.uint8).reshape(blocks, 4)
            found[f"blk.{layer}.{name}.weight"] = (data.reshape(rows, -1), kind)
    kept, plain = opened(tmp_path, found, blocks=True), opened(tmp_path, found)
    assert len(weights_of(kept.params)) == 8
    jax.tree.map(np.testing.assert_array_equal, merge(kept.params), plain.params)


def test_layers_of_different_types_are_dense_and_said_so(tmp_path, capsys):
    change = {"blk.1.ffn_down.weight": Type.Q8_0, "blk.0.ffn_up.weight": None}
    change |= {"token_embd.weight": Type.Q5_0, "blk.0.attn_v.weight": None}
    found = tensors(Type.Q4_0, change | {"blk.1.attn_v.weight": None})
    kept, plain = opened(tmp_path, found, blocks=True), opened(tmp_path, found)
    said = capsys.readouterr().out.splitlines()
    name = "model.layers.{}.mlp.{}_proj.weight"
    assert said == [
        "embed/table is loaded dense: model.embed_tokens.weight: Q5_0 of shape [32, 64] has no "
        "form in few bits here",
        f"{DOWN} is loaded dense: {name.format(1, 'down')} is {Integer(8, 32)}, "
        f"{name.format(0, 'down')} is {Integer(4, 32)}",
        f"stack_0/block_0/ffn/up/kernel is loaded dense: {name.format(0, 'up')}: is not quantized",
    ]
    assert len(weights_of(kept.params)) == 4
    jax.tree.map(np.testing.assert_array_equal, merge(kept.params), plain.params)


def test_on_a_mesh_and_under_lora(tmp_path):
    found = tensors(Type.Q4_1)
    plain = opened(tmp_path, found)
    spread = opened(tmp_path, found, blocks=True, mesh=make_mesh(1, 2, 2))
    down = weights_of(spread.params)[DOWN]
    assert down.codes.sharding.shard_shape(down.codes.shape) == (2, 32, 24)
    np.testing.assert_allclose(spread.logits(TOKENS), plain.logits(TOKENS), rtol=0, atol=1e-4)
    kept = opened(tmp_path, found, blocks=True)
    adapted = lora.add(kept.params, r".*/kernel", jax.random.key(0), rank=2)
    again = lora.remove(adapted)
    assert jax.tree.structure(again) == jax.tree.structure(kept.params)
    logits = kept.model.apply({"params": adapted}, TOKENS)
    np.testing.assert_allclose(logits, plain.logits(TOKENS), rtol=0, atol=1e-4)


def test_saved_dense(tmp_path):
    kept = opened(tmp_path, tensors(Type.Q8_0), blocks=True)
    hub.save(tmp_path / "out", kept)
    again = hub.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.params, merge(kept.params))


def test_bad_input(tmp_path):
    found = tensors(Type.Q4_0)
    data, _ = found["blk.1.attn_k.weight"]
    data[3, :2] = np.array([np.nan], np.float16).view(np.uint8)
    with pytest.raises(CheckpointError, match=r"model.gguf: tensor 'blk.1.attn_k.weight' holds sc"):
        opened(tmp_path, found, blocks=True)
    with pytest.raises(CheckpointError, match=r"gqa is a directory: only .gguf files have blocks"):
        hub.load(FIXTURES / "tiny_llama" / "gqa", blocks=True)


@pytest.mark.weights
def test_smollm2_takes_what_its_file_takes():
    """102 MB at most is what its blocks weigh; 538 MB is what it takes in float32."""
    path = smollm2()
    kept, plain = hub.load(path, blocks=True), hub.load(path)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(kept.params))
    assert 90e6 < held <= 110e6
    assert all(is_quantized(w) for name, w in weights_of(kept.params).items())
    assert len(weights_of(kept.params)) == 8
    ids = kept.tokenizer.encode("In the beginning God created the heaven and the earth.")
    found, expected = kept.logits(ids), plain.logits(ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert jnp.abs(expected).max() > 5
