"""The comparison of methods' steps, on a tiny model; its times say nothing here."""

import argparse

import numpy as np

from research.models import decoder
from research.models.families.llama import llama
from scripts import bench_peft

MODEL = decoder.Decoder(llama(50, 2, 16, 4, 2, 24, tied=True, max_length=64))


def test_the_tokens_of_a_prompt_stand_before_the_same_rows_and_have_no_loss():
    plain, after = (bench_peft.rows(50, 3, 6, before) for before in ((), (50, 51)))
    np.testing.assert_array_equal(after["tokens"][:, 2:], plain["tokens"])
    np.testing.assert_array_equal(after["tokens"][:, :2], [[50, 51]] * 3)
    assert not after["weights"][:, :2].any()
    np.testing.assert_allclose(after["weights"].sum(), 1, rtol=1e-6)


def test_a_line_has_the_median_of_the_ratios_of_each_turn():
    memory = {"peak_bytes": 5_000_000, "temporary_bytes": 2_000_000}
    found = bench_peft.line("LoRA", [1.0, 4.0, 1.5], [2.0, 5.0, 2.0], memory)
    assert found == ["LoRA", "1.500", "0.75", "5", "2"]


def test_methods_take_turns_with_full_fine_tuning(key):
    options = argparse.Namespace(methods=["LoRA", "prompt tuning"], rows=2, length=6, repeats=1)
    table = bench_peft.compare(MODEL, decoder.init(MODEL, key), options)
    lines = [line.split(" | ") for line in table.splitlines()[2:5]]
    assert [line[0] for line in lines] == ["| full", "| LoRA", "| prompt tuning"]
    assert lines[0][2] == "1.00"
    assert "1 steps of each in turns" in table
