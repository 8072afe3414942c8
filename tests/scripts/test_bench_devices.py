"""The benchmarks for one device: what they count, and that a wrong kernel does not get past the gate."""

import json

import jax
import pytest

from research.kernels.attend import reference
from research.kernels.blockwise import blockwise
from research.models import decoder
from research.models.decoder import Decoder
from research.models.families.llama import llama
from scripts import bench
from scripts.benchmark import attention, gate, train


def test_flops_by_hand():
    work = attention.Work(T=8, H=4, causal=False, backward=False, tokens=16, width=12)
    assert work.sizes == (2, 8, 3, 3, 4)
    assert work.flops == 2 * 3 * (2 * 8 * 8 * 4 + 2 * 8 * 8 * 4)
    assert attention.Work(8, 4, True, True, 16, 12).flops == work.flops * 0.5 * 3.5


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_a_token_by_hand(tied):
    config = llama(50, 2, 16, 4, 2, 24, tied=tied)
    params = jax.jit(decoder.init, static_argnums=0)(Decoder(config), jax.random.key(0))
    matrices = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24) + 16 * 50
    assert train.flops_per_token(config, params, T=10) == 6 * matrices + 12 * 2 * 16 * 10


def test_a_wrong_kernel_does_not_pass():
    def wrong(q, k, v, mask, scale=None, dropout=None, softcap=None):
        return reference(q, k, v, mask, scale, dropout, None)  # forgets the soft cap

    assert gate.gate("blockwise", blockwise, 48, 16) <= 1.5
    with pytest.raises(AssertionError, match=r"flash2 is .* times as far from float32"):
        gate.gate("flash2", wrong, 48, 16)


def test_the_table_has_shares_of_a_known_device_and_ratios():
    row = {"device": "NVIDIA H100 80GB HBM3", "T": 512, "H": 64, "causal": True, "backward": False}
    row["tflops"] = {"flash2": 494.5, "cudnn": 600.0}
    text = attention.table([row], ["flash2", "cudnn"])
    assert "| 512 | 64 | causal | forward | 494 (50 %, 0.82 of cuDNN) | 600 (61 %) |" in text


def test_a_step_of_a_small_model(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    small = "--preset smollm2-135m --layers 1 --length 16 --batch 2 --steps 1 --attend reference"
    bench.main(["train", *small.split(), "--output", str(output)])
    row = json.loads(output.read_text())
    assert row == json.loads(capsys.readouterr().out)
    assert row["layers"] == 1 and row["attention"] == "reference" and row["tokens_per_s"] > 0
    table = 49152 * 576  # alone, with AdamW's two moments and gradients of its size
    assert row["peak_bytes"] > 4 * 4 * table
