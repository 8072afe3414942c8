"""The benchmark of DPO's step: its rows are pairs, and its programs compute what they say."""

import numpy as np

from scripts import bench_preference


def test_rows_are_pairs_whose_prompts_weigh_nothing():
    batch = bench_preference.batch_of(2, 32, 50)
    np.testing.assert_array_equal(np.unique(batch["segment_ids"]), [1, 2])
    assert batch["weights"].sum() == 1 or abs(batch["weights"].sum() - 1) < 1e-6
    assert not batch["weights"][:, [0, 3, 16, 19]].any() and batch["weights"][:, [4, 15, 20]].all()
    assert batch["positions"].max() == 15


def test_it_runs():
    row = bench_preference.measure(bench_preference.programs(1, 1, 16), 2)
    assert row["lowest"] <= row["ratio"] <= row["highest"] and row["dpo_s"] > 0
