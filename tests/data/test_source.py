"""Batches are functions of (seed, step): rebuilt alone, resumed anywhere, complete each epoch."""

import numpy as np
import pytest

from research.data import packing, shuffle, source, supervised


@pytest.fixture(scope="module")
def table():
    lengths = np.random.default_rng(1).integers(2, 17, 60)
    return packing.pack([supervised.shift(np.arange(n), np.ones(n)) for n in lengths], 16)


def run(made, steps, state=None, key=None):
    state = made.init(key) if state is None else state
    batches = []
    for _ in range(steps):
        batch, state = made.next(state, None, None, key, None)
        batches.append(batch)
    return batches, state


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_raw_numbers_are_addressed():
    whole = shuffle.raw(3, 5, 40)
    for offset in range(13):
        assert np.array_equal(shuffle.raw(3, 5, 7, offset), whole[offset : offset + 7])
    # Pinned: a change here changes the order of every run ever recorded.
    assert shuffle.permutation(0, 0, 8).tolist() == PINNED


PINNED = [0, 2, 1, 5, 4, 3, 6, 7]


def test_each_epoch_is_another_permutation():
    orders = [shuffle.permutation(7, epoch, 50) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], shuffle.permutation(8, 0, 50))


def test_every_item_once_an_epoch_across_batches():
    items = np.concatenate([shuffle.batch_items(1, step, 4, 10) for step in range(5)])
    assert sorted(items[:10]) == sorted(items[10:]) == list(range(10))


def test_any_batch_can_be_rebuilt_alone(table, key):
    made = source.supervised_source(table, 4, seed=3)
    batches, _ = run(made, 12, key=key)
    for step in (11, 0, 7):
        assert equal(batches[step], source.supervised_batch(table, 4, 3, step))


def test_resumed_source_goes_on_with_the_same_batches(table, key):
    parts = [source.supervised_source(table, 4, 3), source.supervised_source(table, 4, 9)]
    for made in (parts[0], source.mixture(parts, [1, 2], seed=5)):
        whole, _ = run(made, 9, key=key)
        _, state = run(made, 4, key=key)
        rest, _ = run(made, 5, state, key)
        assert all(equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_normalise_sums_to_one(table):
    batch = source.supervised_batch(table, 4, 0, 0)
    assert batch["weights"].sum() == pytest.approx(1, abs=1e-6)
    raw = {name: values[:4] for name, values in table.items()}
    more = source.normalise({**raw, "other": raw["weights"] * 3}, ("weights", "other"))
    assert more["other"].sum() == pytest.approx(1, abs=1e-6)
    assert more["tokens"] is raw["tokens"] and raw["weights"].max() == 1
    with pytest.raises(ValueError, match=r"batch\['weights'\] sums to 0"):
        source.normalise({"weights": np.zeros((2, 3), np.float32)})


def test_batch_has_the_fields_and_types(table):
    batch = source.supervised_batch(table, 4, 0, 0)
    assert set(batch) == set(packing.FIELDS)
    for name, values in batch.items():
        assert values.shape == (4, 16)
        assert values.dtype == (np.float32 if name == "weights" else np.int32)


def test_pretraining_epoch_sees_every_token_once(key):
    stream = np.arange(81)
    made = source.pretraining_source(stream, 8, 5, seed=0)
    batches, _ = run(made, 2, key=key)
    assert sorted(np.concatenate([b["tokens"].ravel() for b in batches])) == list(range(80))
    assert all((b["targets"] == b["tokens"] + 1).all() for b in batches)
    assert equal(batches[1], source.pretraining_batch(stream, 8, 5, 0, 1))
    with pytest.raises(ValueError, match="a stream of 8 tokens has no window"):
        source.pretraining_source(stream[:8], 8, 5, seed=0)


def constant(value):
    return source.stepped(lambda step: {"value": value, "step": step})


def test_mixture_has_its_proportions_and_every_source_its_order(key):
    made = source.mixture([constant(i) for i in range(3)], [1, 0, 3], seed=2)
    batches, state = run(made, 2000, key=key)
    values = np.array([b["value"] for b in batches])
    assert np.array_equal(values, source.choices([1, 0, 3], 2, 0, 2000))
    assert (values == 1).sum() == 0
    assert (values == 0).mean() == pytest.approx(0.25, abs=0.03)  # 3 standard deviations
    for i in (0, 2):
        assert [b["step"] for b in batches if b["value"] == i] == list(range((values == i).sum()))
    assert [int(s["step"]) for s in state["sources"]] == np.bincount(values, minlength=3).tolist()


def test_mixture_choice_of_a_step_needs_no_history():
    whole = source.choices([2, 1, 1], 4, 0, 50)
    assert [source.choices([2, 1, 1], 4, step, 1)[0] for step in range(50)] == whole.tolist()


def test_bad_mixtures():
    with pytest.raises(ValueError, match="1 sources but 2 weights"):
        source.mixture([constant(0)], [1, 2], 0)
    with pytest.raises(ValueError, match="must be >= 0 and not all 0"):
        source.mixture([constant(0)], [0], 0)
