"""The benchmark of few bits with tiny matrices and a tiny model, and its cells by hand."""

import jax
import numpy as np
import pytest

from research.decode.generate import for_decoding
from research.models import decoder
from research.models.families.llama import llama
from research.weights.formats import Integer
from research.weights.quantized import quantize
from scripts.bench_quantized import (
    REPRESENTATIONS,
    cells,
    copies,
    model_rows,
    parse,
    product_rows,
    products,
    turns,
)


def test_cells_by_hand():
    """Medians 2 and 3 s; ratios of turns 3, 1.5 and 0.5."""
    found = cells({"dense": [1.0, 2.0, 4.0], "few": [3.0, 3.0, 2.0]}, lambda s: f"{s:.0f} s")
    assert found == ["2 s (1.00)", "3 s (1.50)"]


def test_repetitions_take_turns_after_a_first_call():
    calls = []
    times = turns({name: lambda name=name: calls.append(name) for name in "ab"}, 2)
    assert calls == ["a", "b"] * 3
    assert [len(t) for t in times.values()] == [2, 2]


def test_copies_fill_the_megabytes():
    assert copies((576, 1536), 60) == 17 and copies((49152, 576), 60) == 1


@pytest.mark.parametrize("name, shape", [("ffn down", (64, 16)), ("table", (16, 64))])
def test_every_representation_multiplies_nearly_the_same_matrix(name, shape):
    found = {kind: run()[0] for kind, run in products(name, shape, 3, 0).items()}
    assert list(found) == list(REPRESENTATIONS)
    for kind, product in found.items():
        assert product.shape == (3, 16)
        error = np.linalg.norm(product - found["dense"]) / np.linalg.norm(found["dense"])
        assert error < (1e-5 if kind.startswith("dense") else 0.15), kind


def test_a_line_for_each_number_of_rows():
    lines = list(product_rows({"ffn up": (64, 16)}, [1, 2], 1, 0))
    assert [line[:2] for line in lines] == [["ffn up 64×16", "1"], ["ffn up 64×16", "2"]]
    assert all(len(line) == 2 + len(REPRESENTATIONS) for line in lines)


def test_lines_of_a_model():
    model = decoder.Decoder(llama(40, 1, 16, 2, 2, 16, tied=True))
    params = decoder.init(model, jax.random.key(0))
    few = quantize(params, r".*/kernel", Integer(8, "row"))
    both = {"dense": for_decoding(params), "Int8 row": for_decoding(few, dense=False)}
    options = parse(["--batches", "1", "--tokens", "2", "--prompt", "5", "--repeats", "1"])
    lines = list(model_rows(model, both, options))
    assert [line[0] for line in lines] == ["decode, batch 1", "prefill, 5"]
    assert all(line[1].endswith("(1.00)") and len(line) == 3 for line in lines)


def test_options(capsys):
    assert parse(["--parts", "model"]).layers is None
    with pytest.raises(SystemExit):
        parse(["--repeats", "0"])
    assert "every number must be at least 1" in capsys.readouterr().err
