"""A tiny QLoRA under both kernels: equal losses, memory that only the plain one's scores make grow;
pairs of a packed row by hand, and made-up rows."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import qlora_flash
from experiments.qlora_flash import BASE, FLASH, PLAIN, SWEEP, Config, measured, seen, with_kernel
from experiments.shared.few_bits_tuning import Way, costs, optimizer_of, prepared
from research.data import packing, source, supervised
from research.models import decoder
from research.models.families.llama import llama
from research.runs import override
from research.runs.canonical import run_id, to_json

MODEL = decoder.Decoder(llama(32, 2, 64, 2, 1, 64, max_length=1024, tied=True, init_std=0.3))
WAY = dataclasses.replace(BASE.way, rank=4)


@pytest.fixture(scope="module")
def params():
    return decoder.init(MODEL, jax.random.key(0))


def packed(length, lengths=4 * (40, 7, 60, 33, 90, 5, 64, 20)):
    rng = np.random.default_rng(0)
    shift = supervised.shift
    return packing.pack(
        [shift(rng.integers(1, 32, n + 1).tolist(), [1] * (n + 1)) for n in lengths], length
    )


def test_losses_do_not_depend_on_the_kernel(params, tmp_path):
    """In several tiles, some of them passed over; and losses move: the step is the whole of QLoRA's."""
    found = {}
    for name in (PLAIN, FLASH):
        config = Config(name, 512, 1024, way=WAY, steps=3)
        (tmp_path / name).mkdir()
        found[name] = measured(MODEL, params, packed(512), config, tmp_path / name)
    steps = [f"loss/{n}" for n in (1, 2, 3)]
    plain, flash = (np.array([found[name][step] for step in steps]) for name in (PLAIN, FLASH))
    np.testing.assert_allclose(flash, plain, atol=2e-5)
    assert np.abs(np.diff(plain)).min() > 1e-3
    assert found[PLAIN]["seen"] == found[FLASH]["seen"] < 0.5
    again, kept = (found[PLAIN][f"cost/{way}/temporary_bytes"] for way in ("again", "kept"))
    assert again < kept


def temporaries(params, name, length, tokens=1024):
    config = Config(name, length, tokens, way=Way(rank=4))
    start, rule = prepared(config.way, params, 0)
    batch = source.supervised_batch(packed(length), config.batch_size, 0, 0)
    found = costs(with_kernel(MODEL, name), start, rule, optimizer_of(config.way, config), batch)
    return found["again/temporary_bytes"]


def test_only_the_scores_grow_with_the_row(params):
    """At 1,024 tokens a step the scores are rows × heads × T² floats; nothing else depends on T, few bits
    least of all."""
    grown = {
        name: temporaries(params, name, 1024) - temporaries(params, name, 256)
        for name in (PLAIN, FLASH)
    }
    scores = 4 * 2 * (1024**2 - 4 * 256**2)
    assert grown[PLAIN] > scores
    assert abs(grown[FLASH]) < scores / 4


def test_pairs_of_a_packed_row_by_hand():
    table = {"segment_ids": np.array([[1, 1, 1, 2], [1, 1, 0, 0]])}
    assert seen(table) == (6 + 1 + 3) / 32
    assert seen({"segment_ids": np.ones((3, 4), int)}) == 10 / 16


def test_configs_that_cannot_be():
    with pytest.raises(ValueError, match="no attention kernel 'plain'"):
        Config(kernel="plain")
    with pytest.raises(ValueError, match="2048 tokens are no whole rows of 300"):
        Config(length=300)


def made_up():
    rows = []
    for number, overrides in enumerate([*SWEEP, {"steps": 5}]):
        config = override(BASE, overrides)
        plain = config.kernel == PLAIN
        metrics = {"seen": 0.1, "s_per_step": 20.0 + number, "s_fastest": 19.0}
        for way, size in (("again", 4e8), ("kept", 4e9)):
            metrics[f"cost/{way}/temporary_bytes"] = size * (config.length / 256 if plain else 1)
            metrics[f"cost/{way}/peak_bytes"] = 2e8 + metrics[f"cost/{way}/temporary_bytes"]
        # Step 3 of the flash form is apart by 2e-6, the others by less.
        metrics |= {
            f"loss/{n}": 2.0 - n / 8 + (0 if plain else (n == 3) * 2e-6) for n in range(1, 5)
        }
        row = {"id": run_id("made_up", config), "config": to_json(config), "metrics": metrics}
        rows.append(row | {"overrides": to_json(overrides)})
    return rows


def test_table_and_figure():
    lines = qlora_flash.table(made_up()).splitlines()[2 : 2 + len(SWEEP)]
    assert lines[0].startswith(
        "| conversations | 256 | reference | 10% | 400 | 600 | 4,000 | 20.0 | 19.0 |"
    )
    assert lines[0].endswith("| 1.8750 | 1.5000 | – |")
    assert lines[1].endswith("| 1.8750 | 1.5000 | 2e-06 |")
    assert lines[-1].startswith("| one text | 2048 | blockwise |")
    memory, time = qlora_flash.figure(made_up()).axes
    assert [len(line.get_xdata()) for line in memory.lines] == [4, 4, 4, 4]
    assert [len(line.get_xdata()) for line in time.lines] == [4, 1, 4, 1]
    np.testing.assert_allclose(memory.lines[0].get_ydata(), [0.4, 0.8, 1.6, 3.2])
