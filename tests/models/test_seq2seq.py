"""The encoder–decoder: torch's numbers, and that padded, packed and cached forms are one function."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from research.kernels.mask import Mask
from research.models import decoder, seq2seq
from research.models.additive import Learned
from research.models.block import post_norm, pre_norm
from research.models.families.transformer import PRESETS, transformer
from research.models.position import Rope
from research.objectives import next_token

FIXTURES = Path(__file__).parent / "fixtures"
RESIDUALS = {"post": post_norm, "pre": pre_norm}
SUBLAYERS = {"encoder": ("attention", "ffn"), "decoder": ("attention", "cross", "ffn")}


def model_of(residual="post", **parts):
    config = transformer(
        19, 2, 8, 2, 12, residual=RESIDUALS[residual], attention_bias=True, dropout=0.0, **parts
    )
    return seq2seq.Seq2Seq(config)


def ours(theirs, residual):
    """Tensors under torch.nn.Transformer's names as a tree under ours."""

    def linear(at):
        return {"kernel": theirs[f"{at}.weight"].T, "bias": theirs[f"{at}.bias"]}

    def norm(at):
        return {"scale": theirs[f"{at}.weight"], "bias": theirs[f"{at}.bias"]}

    def attention(at):
        parts = zip(
            "qkv",
            np.split(theirs[f"{at}.in_proj_weight"], 3),
            np.split(theirs[f"{at}.in_proj_bias"], 3),
            strict=True,
        )
        projections = {name: {"kernel": w.T, "bias": b} for name, w, b in parts}
        return projections | {"o": linear(f"{at}.out_proj")}

    def block(side, at):
        tree = {"attention": attention(f"{at}.self_attn")}
        if side == "decoder":
            tree["cross"] = attention(f"{at}.multihead_attn")
        tree["ffn"] = {"up": linear(f"{at}.linear1"), "down": linear(f"{at}.linear2")}
        for number, name in enumerate(SUBLAYERS[side], 1):
            tree[f"{name}_norm"] = norm(f"{at}.norm{number}")
        return tree

    params = {"embed": {"table": theirs["embed.weight"]}}
    for side in SUBLAYERS:
        at = f"transformer.{side}"
        layers = [block(side, f"{at}.layers.{n}") for n in range(2)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        params[side] = {"stack_0": {"block_0": stacked}}
        if residual == "pre":
            params[side]["final_norm"] = norm(f"{at}.norm")
    return params


def fixture(residual):
    """(batch and results, weights, gradients) as scripts/references/transformer_2017.py wrote them."""
    found = load_file(FIXTURES / f"transformer_{residual}.safetensors")
    trees = []
    for kind in ("weight.", "grad."):
        tensors = {n.removeprefix(kind): v for n, v in found.items() if n.startswith(kind)}
        trees.append(ours(tensors, residual))
    return found, *trees


def batch_of(found):
    source, target = found["source"].astype(np.int32), found["target"].astype(np.int32)
    weights = (target[:, 1:] != 0).astype(np.float32)
    return {
        "source": source,
        "source_segment_ids": (source != 0).astype(np.int32),
        "tokens": target[:, :-1],
        "segment_ids": (target[:, :-1] != 0).astype(np.int32),
        "targets": target[:, 1:],
        "weights": weights / weights.sum(),
    }


@pytest.fixture(scope="module", params=["post", "pre"])
def case(request):
    found, params, _ = fixture(request.param)
    return model_of(request.param), params, batch_of(found)


@partial(jax.jit, static_argnames=("model", "method"))
def apply(model, params, *arguments, **more):
    return model.apply({"params": params}, *arguments, **more)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_logits_loss_and_gradients_equal_torch(residual):
    found, params, theirs = fixture(residual)
    batch, model = batch_of(found), model_of(residual)
    inputs = {name: batch[name] for name in ("tokens", "segment_ids", "source_segment_ids")}
    logits = apply(model, params, batch["source"], **inputs)
    real = batch["segment_ids"] != 0
    np.testing.assert_allclose(logits[real], found["logits"][real], rtol=0, atol=1e-4)
    objective = next_token(model, label_smoothing=0.1)
    loss = jax.jit(jax.value_and_grad(lambda p: objective(p, None, batch, None)[0]))
    value, gradient = loss(params)
    assert float(value) == pytest.approx(float(found["loss"]), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), gradient, theirs)


def test_fresh_parameters_are_those_of_the_fixture_in_form(case):
    model, params, _ = case
    fresh = seq2seq.init(model, jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
    assert seq2seq.count_parameters(model) == sum(leaf.size for leaf in jax.tree.leaves(params))
    names = seq2seq.axes(model)
    same = jax.tree.map(lambda leaf, axes: leaf.ndim == len(axes), fresh, names)
    assert all(jax.tree.leaves(same))
    kernel = names["decoder"]["stack_0"]["block_0"]["cross"]["q"]["kernel"]
    assert kernel == ("layers", "embed", "heads")


def test_padding_changes_nothing_that_is_real(case):
    model, params, batch = case
    source, tokens = batch["source"][:1], batch["tokens"][:1]
    want = apply(model, params, source, tokens)
    pad = partial(np.pad, pad_width=((0, 0), (0, 3)))
    ids = {"source_segment_ids": np.ones_like(source), "segment_ids": np.ones_like(tokens)}
    padded = {name: pad(value) for name, value in ids.items()}
    got = apply(model, params, pad(source, constant_values=7), pad(tokens), **padded)
    np.testing.assert_allclose(got[:, : tokens.shape[1]], want, atol=1e-5)
    only = {"source_segment_ids": padded["source_segment_ids"]}
    got = apply(model, params, pad(source, constant_values=7), tokens, **only)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_packed_pairs_equal_separate_ones(case):
    model, params, batch = case
    rows = [(batch["source"][0], batch["tokens"][0]), (batch["source"][1][:3], batch["tokens"][1])]
    source, tokens = (np.concatenate(side)[None] for side in zip(*rows, strict=True))
    ids = [
        np.repeat([1, 2], [len(side) for side in sides])[None] for sides in zip(*rows, strict=True)
    ]
    got = apply(model, params, source, tokens, segment_ids=ids[1], source_segment_ids=ids[0])
    for number, (alone, target) in enumerate(rows, 1):
        want = apply(model, params, alone[None], target[None])[0]
        np.testing.assert_allclose(got[0, ids[1][0] == number], want, atol=1e-5)
    leaking = apply(model, params, source, tokens)
    assert np.abs(leaking - got).max() > 1e-2


def test_the_target_is_causal_and_the_source_is_not(case):
    model, params, batch = case
    source, tokens = batch["source"][:1], batch["tokens"][:1]
    before = apply(model, params, source, tokens)
    after = apply(model, params, source, tokens + np.eye(4, dtype=int)[2])
    np.testing.assert_allclose(after[:, :2], before[:, :2], atol=1e-6)
    assert np.abs(after - before)[:, 2:].max() > 1e-3
    changed = source + np.eye(6, dtype=int)[5]
    states = [apply(model, params, x, method="encode") for x in (source, changed)]
    assert np.abs(states[1] - states[0]).max(axis=-1).min() > 1e-4  # every one sees the last
    assert np.abs(apply(model, params, changed, tokens) - before).max(axis=-1).min() > 1e-4


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("scan", [True, False])
def test_cached_decoding_equals_the_full_forward_at_every_step(case, stacked, scan):
    model, params, batch = case
    model = seq2seq.Seq2Seq(dataclasses.replace(model.config, scan=scan))
    source, ids, tokens = batch["source"], batch["source_segment_ids"], batch["tokens"]
    want = apply(model, params, source, tokens, source_segment_ids=ids)
    params = params if stacked else seq2seq.unstack(params)
    cache = seq2seq.empty_cache(model, *tokens.shape, source.shape[1], stacked=stacked)
    first = {"source_segment_ids": ids, "cache": cache}
    logits, cache = apply(model, params, source, tokens[:, :1], **first)
    got = [logits]
    for t in range(1, tokens.shape[1]):
        logits, cache = apply(model, params, None, tokens[:, t : t + 1], cache=cache)
        got.append(logits)
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, atol=1e-5)


def test_later_steps_do_not_read_the_source_again(case):
    """With the encoder and the projections of its states gone, they go on all the same."""
    model, params, batch = case
    source, tokens = batch["source"][:1], batch["tokens"][:1]
    want = apply(model, params, source, tokens)
    cache = seq2seq.empty_cache(model, 1, 4, source.shape[1])
    _, cache = apply(model, params, source, tokens[:, :2], cache=cache)
    nan = partial(jax.tree.map, lambda w: jnp.full_like(w, jnp.nan))
    block = params["decoder"]["stack_0"]["block_0"]
    cross = {**block["cross"], "k": nan(block["cross"]["k"]), "v": nan(block["cross"]["v"])}
    spoilt = {**params["decoder"], "stack_0": {"block_0": {**block, "cross": cross}}}
    params = {**params, "encoder": nan(params["encoder"]), "decoder": spoilt}
    got, _ = apply(model, params, None, tokens[:, 2:], cache=cache)
    np.testing.assert_allclose(got, want[:, 2:], atol=1e-5)


def test_the_encoder_alone_is_a_decoder_that_looks_both_ways(case):
    model, params, batch = case
    source, ids = batch["source"], batch["source_segment_ids"]
    want = apply(model, params, source, segment_ids=ids, method="encode")
    config, alone = seq2seq.encoder_only(model.config, params)
    got = decoder.Decoder(config).apply(
        {"params": alone}, source, segment_ids=ids, mask=Mask(causal=False), method="hidden"
    )
    np.testing.assert_allclose(got[ids != 0], want[ids != 0], atol=1e-5)


@pytest.mark.parametrize("position", [Rope(), Learned(16)])
def test_other_positions(position):
    model = model_of("pre", position=position)
    params = seq2seq.init(model, jax.random.key(0))
    source, tokens = jnp.array([[3, 4, 5]]), jnp.array([[1, 2, 6]])
    logits = apply(model, params, source, tokens)
    moved = apply(model, params, source[:, ::-1], tokens)
    assert np.abs(moved - logits).max() > 1e-3
    assert ("position" in params) == isinstance(position, Learned)


def test_dropout_needs_a_key_and_changes_with_it(case):
    model, params, batch = case
    config = transformer(19, 2, 8, 2, 12, attention_bias=True, dropout=0.5)
    model = seq2seq.Seq2Seq(dataclasses.replace(config, final_norm=model.config.final_norm))
    run = partial(apply, model, params, batch["source"], batch["tokens"])
    np.testing.assert_array_equal(run(), run())
    drawn = [run(rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-2 and np.abs(drawn[0] - run()).max() > 1e-2


def test_what_does_not_fit_is_refused(case):
    model, params, batch = case
    with pytest.raises(ValueError, match="source is None, and there is no cache"):
        apply(model, params, None, batch["tokens"])
    cache = seq2seq.empty_cache(model, 3, 4, 5)
    with pytest.raises(ValueError, match=r"source of shape \(3, 5\), this one has \(3, 6\)"):
        apply(model, params, batch["source"], batch["tokens"], cache=cache)


def test_sizes_of_the_paper():
    """By hand, for D, F, V: an encoder layer has 4D² + 2DF + F + D + 4D, a decoder layer 4D² + 2D more."""
    counted = {name: seq2seq.count_parameters(seq2seq.Seq2Seq(c)) for name, c in PRESETS.items()}
    for name, D, F in [("transformer-base", 512, 2048), ("transformer-big", 1024, 4096)]:
        encoder = 4 * D**2 + 2 * D * F + F + D + 4 * D
        assert counted[name] == 6 * (2 * encoder + 4 * D**2 + 2 * D) + 37_000 * D
    assert counted == {"transformer-base": 63_045_632, "transformer-big": 214_171_648}
