"""Prefix tuning against peft's numbers, and against the base model that reads real words."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from research import hub
from research.adapters import prefix
from research.decode.beam import Beams, beam_search
from research.decode.contrastive import Contrastive, contrastive_search
from research.decode.generate import generate
from research.decode.prompts import PromptError
from research.decode.sampling import Sampling
from research.decode.speculative import Lookup, speculate
from research.kernels.mask import Mask
from research.models import decoder
from research.models.additive import Learned
from research.models.families.chatglm import chatglm
from research.models.families.llama import llama
from research.models.layers import Mlp
from research.models.linear_attention import LinearAttention
from research.models.position import Alibi
from research.models.prefix import PrefixRope2d
from research.models.stack import Stack
from research.objectives import next_token
from research.paths import named_leaves
from research.train.partition import combine, partition
from research.train.sharding import make_mesh, shardings

FIXTURES = Path(__file__).parent / "fixtures"
LLAMA = Path(__file__).parents[1] / "hub" / "fixtures" / "tiny_llama" / "gqa"
CONFIG = llama(40, 3, 16, 4, 2, 24, tied=True, init_std=0.3, max_length=96)
MODEL = decoder.Decoder(CONFIG)
WORDS, TEXT = np.random.default_rng(0).integers(0, 40, (2, 1, 10)).astype(np.int32)
WORDS = jnp.asarray(WORDS[:, :4])
NAMES = {
    "embedding.weight": ("table",),
    "transform.0.weight": ("hidden", "kernel"),
    "transform.0.bias": ("hidden", "bias"),
    "transform.2.weight": ("out", "kernel"),
    "transform.2.bias": ("out", "bias"),
}


@partial(jax.jit, static_argnums=0)
def compiled(model, params, tokens, more):
    return model.apply({"params": params}, tokens, **more)


def logits(model, params, tokens=TEXT, **more):
    return compiled(model, params, tokens, more)


def changed(**parts):
    return decoder.Decoder(dataclasses.replace(CONFIG, **parts))


def windowed(window):
    """Layers of two kinds, every other with a window, and a stack of one kind."""
    (block,) = CONFIG.stacks[0].pattern
    narrow = block.clone(attention=block.attention.clone(window=window))
    return changed(stacks=(Stack(2, (narrow, block)), Stack(1, (narrow,))))


@pytest.fixture
def params(key):
    return decoder.init(MODEL, key)


@pytest.mark.parametrize("name", ["table", "mlp"])
def test_equals_peft(name):
    numbers, prompts = (
        load_file(FIXTURES / f"prefix_{name}.safetensors"),
        json.loads((LLAMA / "prompts.json").read_text()),
    )
    loaded, own = hub.load(LLAMA), {}
    for theirs, path in NAMES.items():
        if theirs in numbers:
            node = own if len(path) == 1 else own.setdefault(path[0], {})
            node[path[-1]] = numbers[theirs].T if "transform" in theirs else numbers[theirs]
    model = prefix.Prefixed(loaded.model.config, len(own["table"]))

    def loss(own):
        total = 0.0
        for ids in prompts:
            tokens = jnp.asarray(ids)[None]
            weights = jnp.full((1, len(ids) - 1), 1 / (len(ids) - 1))
            batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
            params = {**loaded.params, "prefix": own}
            total += next_token(model, fused=False)(params, None, batch, None)[0]
        return total

    gradients = jax.jit(jax.grad(loss))(own)
    for theirs, path in NAMES.items():
        if theirs in numbers:
            found = gradients[path[0]] if len(path) == 1 else gradients[path[0]][path[1]]
            wanted = numbers[f"grad.{theirs}"]
            wanted = wanted.T if "transform" in theirs else wanted
            np.testing.assert_allclose(found, wanted, atol=1e-5)
    for params in ({"prefix": own}, prefix.finish({"prefix": own})):
        tuned = dataclasses.replace(loaded, model=model, params={**loaded.params, **params})
        for number, ids in enumerate(prompts):
            found = tuned.logits(ids)[0]
            np.testing.assert_allclose(found, numbers[f"logits.{number}"], atol=1e-5)


@pytest.mark.parametrize("form", ["scan", "loop", "apart", "remat", "kinds"])
def test_a_prefix_of_real_words_is_the_base_that_read_them(form, key):
    base = {
        "loop": changed(scan=False),
        "remat": changed(remat="full"),
        "kinds": windowed(64),
    }.get(form, MODEL)
    params = decoder.init(base, key)
    if form == "apart":
        params = decoder.unstack(params)
    model, tuned = prefix.add_text(base, params, WORDS[0])
    whole = logits(base, params, jnp.concatenate([WORDS, TEXT], axis=1))
    np.testing.assert_allclose(logits(model, tuned), whole[:, 4:], atol=1e-5)
    plain, kept = prefix.remove(model, tuned)
    assert plain == base and jax.tree.structure(kept) == jax.tree.structure(params)


def test_padding_on_either_side_changes_nothing(params):
    for base in (MODEL, windowed(3)):
        model, tuned = prefix.add_text(base, decoder.init(base, jax.random.key(0)), WORDS[0])
        wanted = logits(model, tuned)
        for sides in ((5, 0), (0, 5)):
            padded, real = (np.pad(a, ((0, 0), sides)) for a in (TEXT, np.ones_like(TEXT)))
            found = logits(model, tuned, padded, segment_ids=jnp.asarray(real))
            found = found[:, sides[0] : sides[0] + TEXT.shape[1]]
            np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_padding_needs_no_position(key):
    base = changed(position=Learned(16), max_length=16)
    model, tuned = prefix.add_text(base, decoder.init(base, key), WORDS[0])
    padded, real = (np.pad(a, ((0, 0), (0, 6))) for a in (TEXT, np.ones_like(TEXT)))
    found = logits(model, tuned, padded, segment_ids=jnp.asarray(real))[:, : TEXT.shape[1]]
    np.testing.assert_allclose(found, logits(model, tuned), atol=1e-5)
    with pytest.raises(ValueError, match="a prefix of 4 and 16 tokens are more than 16 positions"):
        logits(model, tuned, padded)


def test_words_that_are_no_ids_are_refused(params):
    for wrong in (WORDS, WORDS[0] + 40, WORDS[0, :0]):
        with pytest.raises(ValueError, match=r"a prefix of words needs ids \[P\] in 0..39"):
            prefix.add_text(MODEL, params, wrong)


def test_a_window_does_not_hide_the_prefix(key):
    base = windowed(3)
    model, tuned = prefix.add(base, decoder.init(base, key), key, 4, std=1.0)
    moved = jax.tree.map(lambda leaf: leaf + 1.0, tuned["prefix"])
    first, second = (logits(model, {**tuned, "prefix": p}) for p in (tuned["prefix"], moved))
    assert (jnp.abs(first - second).max(-1) > 1e-3).all()


def slow(model, params, ids, count):
    """Greedy, reading everything again for every token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(jnp.argmax(following(model, params, ids))))
    return ids[-count:]


def following(model, params, ids):
    """Logits [V] after the ids; what stands behind them no causal model sees."""
    row = jnp.asarray([ids + [0] * (20 - len(ids))])
    return logits(model, params, row)[0, len(ids) - 1]


def test_every_decoder_says_what_a_slow_loop_says(params, key):
    model, tuned = prefix.add(MODEL, params, key, 5, hidden=6)
    prompts = [TEXT[0, :7].tolist(), TEXT[0, 5:8].tolist()]
    wanted = [slow(model, tuned, prompt, 4) for prompt in prompts]
    greedy = Sampling(temperature=0, max_tokens=4)
    assert generate(model, tuned, prompts, key, greedy).rows() == wanted
    assert beam_search(model, tuned, prompts, Beams(1, max_tokens=4)).rows() == wanted
    search = Contrastive(top_k=2, alpha=0.0, max_tokens=4)
    assert contrastive_search(model, tuned, prompts, search).rows() == wanted
    spoken = speculate(model, tuned, prompts[0], key, greedy, Lookup(2))
    assert spoken.generation.rows() == wanted[:1]


def test_filters_see_the_text_and_not_the_prefix(params, key):
    model, tuned = prefix.add_text(MODEL, params, WORDS[0])
    both = [*WORDS[0].tolist(), *TEXT[0].tolist()]
    unseen = generate(
        model, tuned, [TEXT[0].tolist()], key, Sampling(temperature=0, max_tokens=6)
    ).rows()[0]
    assert (
        unseen
        == generate(MODEL, params, [both], key, Sampling(temperature=0, max_tokens=6)).rows()[0]
    )
    rule = Sampling(temperature=0, max_tokens=6, repetition_penalty=5.0)
    found, ids = generate(model, tuned, [TEXT[0].tolist()], key, rule).rows()[0], TEXT[0].tolist()
    for token in found:
        last = following(model, tuned, ids)
        scaled = jnp.where(last > 0, last / 5.0, last * 5.0)
        seen = jnp.zeros(40, bool).at[jnp.asarray(ids)].set(True)
        assert token == int(jnp.argmax(jnp.where(seen, scaled, last)))
        ids.append(token)


def test_where_the_text_stands(params, key):
    model, tuned = prefix.add(MODEL, params, key, 3, std=1.0)
    still = prefix.Prefixed(model.config, 3, moves=False)
    at = jnp.arange(TEXT.shape[1])[None]
    assert jnp.abs(logits(model, tuned) - logits(still, tuned)).max() > 1e-3
    moved = logits(still, tuned, positions=at + 3)
    np.testing.assert_allclose(logits(model, tuned), moved, atol=1e-6)
    np.testing.assert_allclose(logits(model, tuned, positions=at), moved, atol=1e-6)


def test_only_the_prefix_trains_and_finish_keeps_the_function(params, key):
    model, tuned = prefix.add(MODEL, params, key, 3, hidden=5)
    trainable, frozen = partition(tuned, prefix.TRAINABLE)
    assert len(named_leaves(trainable)) == 5
    batch = {"tokens": TEXT[:, :-1], "targets": TEXT[:, 1:], "weights": jnp.ones((1, 9))}

    def loss(trainable):
        return next_token(model)(combine(trainable, frozen), None, batch, None)[0]

    value, slope = jax.value_and_grad(loss)(trainable)
    after = jax.tree.map(lambda w, g: w - 0.01 * g, trainable, slope)
    assert loss(after) < value
    both = combine(after, frozen)
    assert all(
        np.array_equal(leaf, dict(named_leaves(params))[name])
        for name, leaf in named_leaves(prefix.remove(model, both)[1])
    )
    done = prefix.finish(both)
    assert set(done["prefix"]) == {"table"}
    np.testing.assert_allclose(logits(model, done), logits(model, both), atol=1e-6)


def test_dropout_is_of_training_alone(params, key):
    model, tuned = prefix.add(MODEL, params, key, 3, dropout=0.5, std=1.0)
    still = prefix.Prefixed(model.config, 3)
    assert jnp.array_equal(logits(model, tuned), logits(still, tuned))
    dropped = logits(model, tuned, rngs={"dropout": key})
    assert jnp.abs(dropped - logits(still, tuned)).max() > 1e-3


def test_axes_name_every_leaf(params, key):
    model, tuned = prefix.add(MODEL, params, key, 3, hidden=6)
    names = decoder.axes(model) | prefix.axes(tuned)
    placed, notes = shardings(names, tuned, make_mesh(tensor=2))
    assert placed["prefix"]["out"]["kernel"].spec == PartitionSpec("tensor", None)
    assert not notes


def test_rows_of_several_segments_are_refused(params, key):
    model, tuned = prefix.add(MODEL, params, key, 3)
    packed = jnp.asarray([[1] * 10, [1] * 5 + [2] * 5])
    rows = jnp.tile(TEXT, (2, 1))
    with pytest.raises(ValueError, match="row 1 is packed"):
        model.apply({"params": tuned}, rows, segment_ids=packed)
    found = jax.jit(lambda s: logits(model, tuned, rows, segment_ids=s))(packed)
    assert jnp.isnan(found[1]).all() and not jnp.isnan(found[0]).any()


def test_what_cannot_take_a_prefix_is_named(params, key):
    model, tuned = prefix.add(MODEL, params, key, 6)
    with pytest.raises(ValueError, match="a prefix of 96 does not fit the context of 96"):
        prefix.add(MODEL, params, key, 96)
    with pytest.raises(ValueError, match="have a prefix already"):
        prefix.add(MODEL, tuned, key)
    with pytest.raises(ValueError, match="Alibi measures distance"):
        prefix.add(changed(position=Alibi()), params, key)
    (block,) = CONFIG.stacks[0].pattern
    linear = block.clone(attention=LinearAttention(4, 2, 4))
    with pytest.raises(ValueError, match="stack_0/block_0: LinearAttention"):
        prefix.add(changed(stacks=(Stack(3, (linear,)),)), params, key)
    with pytest.raises(ValueError, match=r"Decoder does not read the parameters \['prefix'\]"):
        logits(MODEL, tuned)
    with pytest.raises(ValueError, match="have no prefix: prefix"):
        logits(model, params)
    with pytest.raises(ValueError, match=r"the prefix is \(6, 48\), expected \[2"):
        logits(prefix.Prefixed(CONFIG, 2), tuned)
    with pytest.raises(ValueError, match="begin it with `start`"):
        logits(model, tuned, cache=decoder.empty_cache(model, 1, 20))
    with pytest.raises(PromptError, match=r"after a prefix of 6, prompt 0 has 10 .* context of 96"):
        generate(model, tuned, [TEXT[0].tolist()], key, Sampling(max_tokens=81))


def test_a_mask_counts_the_text_alone(params):
    model, tuned = prefix.add_text(MODEL, params, WORDS[0])
    mask = Mask(prefix=jnp.array([3]))
    base, tokens = Mask(prefix=jnp.array([7])), jnp.concatenate([WORDS, TEXT], axis=1)
    found = logits(model, tuned, mask=mask)
    # The words were read causally; so must the base read them before the opened columns.
    cache = decoder.empty_cache(MODEL, 1, 14)
    _, cache = logits(MODEL, params, tokens[:, :4], cache=cache)
    wanted, _ = logits(MODEL, params, tokens[:, 4:], mask=base, cache=cache)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_saved_model_refuses_a_prefix(tmp_path, key):
    loaded = hub.load(LLAMA)
    model, tuned = prefix.add(loaded.model, loaded.params, key, 3)
    with pytest.raises(hub.CheckpointError, match="prefix/table"):
        hub.save(tmp_path / "model", dataclasses.replace(loaded, model=model, params=tuned))


@pytest.mark.parametrize("moves", [True, False])
def test_positions_that_are_read_in_the_tokens(moves, key):
    scheme = PrefixRope2d(start_id=39, mask_ids=(38, 37))
    base = decoder.Decoder(chatglm(40, 2, 16, 2, Mlp(24, bias=True), position=scheme))
    ids = [5, 6, 38, 39, 7, 8]
    model, tuned = prefix.add(base, decoder.init(base, key), key, 3, moves=moves, std=1.0)
    first, second = np.array([0, 1, 2, 2, 2, 2]), np.array([0, 0, 0, 1, 2, 3])
    found = logits(model, tuned, jnp.asarray([ids]))
    given = {
        "positions": jnp.stack([first, second], axis=-1)[None],
        "mask": Mask(prefix=jnp.array([3])),
    }
    np.testing.assert_allclose(logits(model, tuned, jnp.asarray([ids]), **given), found, atol=1e-5)
    said = generate(model, tuned, [ids], key, Sampling(temperature=0, max_tokens=3)).rows()[0]
    assert said == slow(model, tuned, ids, 3)
