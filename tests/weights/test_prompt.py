"""Prompt tuning and P-tuning against peft's numbers, a longer table, and by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuned_models import forms, hub_model, logits, peft_numbers

from research.data.packing import pack
from research.data.supervised import prepend, shift
from research.decode.generate import for_decoding
from research.models import decoder
from research.models.families.llama import llama
from research.objectives import next_token
from research.paths import RuleError, named_leaves
from research.train.optim import AdamW, optimizer
from research.train.partition import combine, partition
from research.train.sharding import make_mesh, shardings
from research.train.state import initial_state
from research.train.step import make_step
from research.weights import base, lora, merge, noisy, prompt, prompt_encoder

V, D, P = 40, 16, 5
MODEL = decoder.Decoder(llama(V, 2, D, 4, 2, 24, tied=True, init_std=0.3))
TOKENS = jnp.asarray([[V, V + 1, V + 2, V + 3, V + 4, 7, 9, 30], [3, V + 4, 2, V, V + 1, 8, 39, 0]])
LSTM = partial(prompt_encoder.lstm, hidden=6)
MLP = partial(prompt_encoder.mlp, hidden=6)
INITIALS = {"rows": prompt.normal, "mlp": MLP, "lstm": LSTM}


@pytest.fixture(scope="module")
def params():
    return jax.jit(decoder.init, static_argnums=0)(MODEL, jax.random.key(0))


def table_of(params):
    return params["embed"]["table"]


def layer(numbers, number):
    """torch's matrices are [out, in]."""
    kernel, bias = (numbers[f"mlp_head.{number}.{part}"] for part in ("weight", "bias"))
    return {"kernel": kernel.T, "bias": bias}


def direction(numbers, number, way, joined):
    """`joined`: what torch's two biases are as one, their sum or the gradient of either."""
    name = f"_l{number}{way}"
    biases = [numbers[f"lstm_head.bias_{kind}{name}"] for kind in ("ih", "hh")]
    kinds = {"input": "ih", "recurrent": "hh"}
    found = {ours: numbers[f"lstm_head.weight_{kind}{name}"].T for ours, kind in kinds.items()}
    return found | {"bias": joined(biases)}


def node_of(case, numbers, joined):
    """peft's tensors as what stands in a Prompt."""
    rows = numbers["embedding.weight"]
    if case == "rows":
        return rows
    if case == "mlp":
        return prompt_encoder.Mlp(rows, [layer(numbers, number) for number in (0, 2, 4)])
    ways = {"forward": "", "backward": "_reverse"}
    recurrent = [
        {name: direction(numbers, number, way, joined) for name, way in ways.items()}
        for number in (0, 1)
    ]
    return prompt_encoder.Lstm(rows, recurrent, [layer(numbers, number) for number in (0, 2)])


def either(biases):
    np.testing.assert_array_equal(*biases)
    return biases[0]


@pytest.mark.parametrize("case", INITIALS)
def test_rows_logits_and_gradients_equal_peft(case):
    model, params, texts = hub_model("tiny_llama/gqa")
    parts = {kind: {} for kind in ("param", "grad", "logits")}
    for name, value in peft_numbers("peft_prompts").items():
        if name.startswith(f"{case}.") and name.count("."):
            kind, _, rest = name.removeprefix(f"{case}.").partition(".")
            parts.setdefault(kind, {})[rest] = value
    tuned = prompt.add(params, jax.random.key(0), P, INITIALS[case])
    node = table_of(tuned).replace(prompt=node_of(case, parts["param"], sum))
    tuned = {**params, "embed": {"table": node}}
    np.testing.assert_allclose(jax.jit(node.rows)(), parts["rows"][""], atol=1e-5)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(tuned):
        total, found = 0.0, []
        for ids in prompt.before(tuned, texts[:2]):
            ids = jnp.asarray(ids)
            found.append(model.apply({"params": tuned}, ids[None])[0])
            log_p = jax.nn.log_softmax(found[-1][P - 1 : -1])
            total -= jnp.take_along_axis(log_p, ids[P:, None], axis=-1).mean()
        return total, found

    grads, found = gradient(tuned)
    for number, ours in enumerate(found):
        np.testing.assert_allclose(ours, parts["logits"][str(number)], rtol=0, atol=1e-5)
    theirs = dict(named_leaves(node_of(case, parts["grad"], either)))
    ours = dict(named_leaves(table_of(grads).prompt))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert np.abs(value).max() > 1e-4
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-5, err_msg=name)


def test_it_is_a_model_with_a_longer_table_whose_head_is_cut(params, key):
    tuned = prompt.add(params, key, P, prompt.normal)
    table = table_of(tuned)
    longer = decoder.Decoder(llama(V + P, 2, D, 4, 2, 24, tied=True))
    whole = {**params, "embed": {"table": jnp.concatenate([table.base, table.prompt])}}
    want = logits(longer, whole, TOKENS)[..., :V]
    for form, found in forms(MODEL, tuned, TOKENS).items():
        np.testing.assert_allclose(found, want, atol=1e-5, err_msg=form)
    np.testing.assert_allclose(logits(MODEL, for_decoding(tuned), TOKENS), want, atol=1e-5)


def test_ids_of_no_row_read_nan_also_under_jit(key):
    node = prompt.Prompt(jax.random.normal(key, (V, 3)), jnp.ones((P, 3)))
    ids = jnp.asarray([0, V - 1, V, V + P - 1, V + P, V + P + 100])
    for rows in (base.take(node, ids), jax.jit(base.take)(node, ids)):
        np.testing.assert_array_equal(rows[:2], node.base[jnp.asarray([0, V - 1])])
        np.testing.assert_array_equal(rows[2:4], 1)
        assert np.isnan(rows[4:]).all()
    assert base.row_count(node) == V + P and base.row_count(node.base) == V


def test_it_stands_on_a_lora_whose_gradient_stays_finite(key):
    tables = {"embed": {"table": jax.random.normal(key, (V, 3))}}
    tuned = prompt.add(lora.add(tables, "embed/table", key, rank=2), key, P)
    grads = jax.grad(lambda p: (base.take(table_of(p), TOKENS) ** 2).sum())(tuned)
    for name, gradient in named_leaves(grads):
        assert np.isfinite(gradient).all(), name
    used = np.zeros(V, bool)
    used[[7, 9, 30, 3, 2, 8, 39, 0]] = True
    moved = np.abs(table_of(grads).base.base).max(-1) > 0
    np.testing.assert_array_equal(moved, used)
    x = jax.random.normal(key, (4, 3))
    np.testing.assert_allclose(
        base.matmul_transposed(x, table_of(tuned)), x @ table_of(tables).T, rtol=1e-5
    )


@pytest.mark.parametrize("fused", [False, True])
def test_packed_examples_with_a_prompt_each_are_what_they_are_alone(params, key, fused):
    tuned = prompt.add(params, key, P)
    virtual = prompt.ids(tuned)
    texts = [[3, 9, 27, 1], [5, 6, 7, 30, 2]]
    examples = [prepend(shift(ids, [0, 0, *[1] * (len(ids) - 2)]), virtual) for ids in texts]
    loss = jax.jit(lambda p, batch: next_token(MODEL, fused=fused)(p, None, batch, None)[0])
    packed = loss(tuned, pack(examples, 20))
    apply = jax.jit(lambda ids: MODEL.apply({"params": tuned}, ids[None])[0])
    want = 0.0
    for ids in texts:
        log_p = jax.nn.log_softmax(apply(jnp.asarray([*virtual, *ids, *[0] * (5 - len(ids))])))
        want -= sum(log_p[P + at - 1, ids[at]] for at in range(2, len(ids)))
    np.testing.assert_allclose(packed, want, rtol=1e-5)


@pytest.mark.parametrize("initial", ["rows", "lstm"])
def test_only_the_prompt_trains(params, key, initial):
    tuned = prompt.add(params, key, P, INITIALS[initial])
    before = {name: np.array(leaf) for name, leaf in named_leaves(tuned)}
    texts = [[3, 9, 27, 1], [5, 6, 7, 30, 2]]
    examples = [prepend(shift(ids, [1] * len(ids)), prompt.ids(tuned)) for ids in texts]
    trainable, frozen = partition(tuned, prompt.TRAINABLE)
    update = optimizer(AdamW(0.05), trainable)
    step = make_step(next_token(MODEL), update)
    state, losses = initial_state(trainable, update, jax.random.clone(key)), []
    for _ in range(3):
        state, metrics = step(state, frozen, None, pack(examples, 20))
        losses.append(float(metrics["loss"].value))
    after = dict(named_leaves(combine(state.trainable, frozen)))
    assert losses[-1] < losses[0]
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("embed/table/prompt")}


@pytest.mark.parametrize("initial", [MLP, LSTM], ids=["mlp", "lstm"])
def test_finish_keeps_the_rows_alone(params, key, initial):
    tuned = prompt.add(params, key, P, initial)
    done = prompt.finish(tuned)
    np.testing.assert_array_equal(table_of(done).prompt, table_of(tuned).rows())
    assert [n for n, _ in named_leaves(done["embed"])] == ["table/base", "table/prompt"]
    assert prompt.ids(done) == prompt.ids(tuned) == list(range(V, V + P))


def test_dropout_falls_between_recurrent_layers_in_training_alone(key):
    one, two = (
        prompt_encoder.lstm(jnp.ones((V, D)), key, P, 6, layers, dropout=0.5) for layers in (1, 2)
    )
    drop = base.Call(dropout=key)
    np.testing.assert_array_equal(one.encode(drop), one.encode(base.EVALUATE))
    assert np.abs(two.encode(drop) - two.encode(base.EVALUATE)).max() > 1e-3


def test_rows_begin_as_they_should(key):
    table = jnp.arange(V * 2.0).reshape(V, 2).astype(jnp.bfloat16)
    drawn = prompt.sampled(table, key, 200, most=7)
    assert drawn.dtype == jnp.float32
    assert set(map(tuple, np.asarray(drawn))) == {(2.0 * i, 2.0 * i + 1) for i in range(7)}
    for length, want in ((5, [3, 1, 3, 1, 3]), (1, [3])):
        rows = prompt.text(table, key, length, ids=[3, 1])
        np.testing.assert_array_equal(rows[:, 0], 2 * np.asarray(want))
    wide = jnp.ones((V, 1000))
    assert abs(prompt.normal(wide, key, 9, std=2.0).std() - 2) < 0.05
    rows = prompt.uniform(wide, key, 9)
    assert 0.49 < rows.max() <= 0.5 and abs(rows.std() - 1 / 12**0.5) < 0.01


def test_encoders_begin_as_torch_begins_them(key):
    table = jnp.ones((V, 64))
    mlp, lstm = (prompt_encoder.mlp(table, key, 50, 25), prompt_encoder.lstm(table, key, 50, 25))
    for encoder in (mlp, lstm):
        assert abs(encoder.embedding.std() - 1) < 0.05
    first, way = mlp.layers[0]["kernel"], lstm.recurrent[1]["backward"]
    assert [w["kernel"].shape for w in mlp.layers] == [(64, 25), (25, 25), (25, 64)]
    assert way["input"].shape == (50, 100) and way["recurrent"].shape == (25, 100)
    assert 0.99 / 8 < np.abs(first).max() <= 1 / 8
    assert 0.99 / 5 < np.abs(way["input"]).max() <= 1 / 5
    assert np.abs(way["bias"]).max() > 1 / 5  # the sum of two


def test_a_prompt_on_a_prompt_has_the_ids_that_follow(params, key):
    first = prompt.add(params, key, 2, lambda *_: jnp.full((2, D), 1.0))
    second = prompt.add(first, key, 3, lambda *_: jnp.full((3, D), 2.0))
    assert prompt.ids(second) == [V + 2, V + 3, V + 4]
    assert prompt.before(first, [[1], [2, 3]]) == [[V, V + 1, 1], [V, V + 1, 2, 3]]
    rows = base.take(table_of(second), jnp.arange(V, V + 5))
    np.testing.assert_array_equal(rows[:, 0], [1, 1, 2, 2, 2])
    jax.tree.map(np.testing.assert_array_equal, prompt.remove(second), first)
    drawn = prompt.sampled(table_of(first), key, 100)
    assert np.abs(drawn - 1).max(-1).min() > 0  # the vocabulary's rows, not the prompt's


def test_remove_gives_the_base_back_and_merge_names_the_table(params, key):
    tuned = prompt.add(params, key, P)
    noise = noisy.add(tuned)
    assert prompt.ids(noise) == prompt.ids(tuned) and base.row_count(table_of(noise)) == V + P
    jax.tree.map(np.testing.assert_array_equal, prompt.remove(tuned), params)
    with pytest.raises(ValueError, match=r"^embed/table cannot be merged: a Prompt.*prompt.remove"):
        merge(tuned)
    with pytest.raises(ValueError, match=r"a Prompt has 5 rows.*no matrix"):
        lora.add(tuned, "embed/table", key)


@pytest.mark.parametrize("initial", INITIALS)
def test_every_leaf_has_a_place_on_a_mesh(params, key, initial):
    tuned = prompt.add(params, key, P, INITIALS[initial])
    axes = base.leaf_axes(tuned, decoder.axes(MODEL))
    assert table_of(axes).base == ("vocab", "embed")
    homes, notes = shardings(axes, tuned, make_mesh(fsdp=2, tensor=2))
    assert jax.tree.structure(homes) == jax.tree.structure(tuned) and not notes
    rows = table_of(homes).prompt
    rows = rows if initial == "rows" else rows.embedding
    assert tuple(rows.spec) == (None, "fsdp")


def test_refusals(params, key):
    with pytest.raises(RuleError, match="matches none"):
        prompt.add(params, key, rule="embedding/table")
    with pytest.raises(ValueError, match=r"embedding tables.*final_norm/scale"):
        prompt.add(params, key, rule="final_norm/scale")
    with pytest.raises(ValueError, match="at least 1, not 0"):
        prompt.add(params, key, 0)
    with pytest.raises(ValueError, match=r"embed/table: rows \(3, 16\) for a prompt of \(5, 16\)"):
        prompt.add(params, key, P, lambda *_: jnp.ones((3, D)))
    for ids in ([], [V], [-1]):
        with pytest.raises(ValueError, match=rf"ids in 0\.\.{V - 1}"):
            prompt.add(params, key, P, partial(prompt.text, ids=ids))
    with pytest.raises(ValueError, match=r"expected 1\.\.40"):
        prompt.add(params, key, P, partial(prompt.sampled, most=V + 1))
    with pytest.raises(ValueError, match="hidden of at least 1, not 0"):
        prompt.add(params, key, P, partial(prompt_encoder.mlp, hidden=0))
    with pytest.raises(ValueError, match="there is no prompt"):
        prompt.ids(params)
