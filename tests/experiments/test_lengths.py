"""Losses by the length of the window, where positions have an end."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.shared import lengths, small_lm
from research.models import decoder
from research.models.additive import Learned
from research.models.decoder import Decoder
from research.models.families.llama import llama
from research.runs import results


def learned(most):
    return Decoder(llama(50, 1, 16, 2, 1, 24, position=Learned(most), max_length=most, tied=True))


def test_lengths_that_no_position_reaches_are_left_out_and_the_tokens_stay():
    """The same rows of positions, once followed by others: the shorter windows are the same."""
    held_out = np.random.default_rng(0).integers(0, 50, 400).astype(np.int32)
    tokenizer = SimpleNamespace(decode=lambda ids: "x" * len(ids))
    data = small_lm.Data(tokenizer, held_out, held_out)
    params = decoder.init(learned(16), jax.random.key(0))
    table = params["position"]["table"]
    more = {**params, "position": {"table": jnp.concatenate([table, table])}}
    short = small_lm.likelihood(learned(16), params, data, (8, 16, 32), 96)
    long = small_lm.likelihood(learned(32), more, data, (8, 16, 32), 96)
    assert list(short) == [8, 16] and list(long) == [8, 16, 32]
    assert {length: long[length] for length in short} == short


def test_scores_are_of_the_lengths_that_a_run_has():
    rows = [{"metrics": {"nll/16": loss, "nll/8": 3.0}} for loss in (1.0, 2.0)]
    group = results.Group({}, tuple(rows))
    found = lengths.scores(group, (16, 32))
    assert found == {16: results.summary([1.0, 2.0])}
    axes = Figure().subplots()
    lengths.draw(axes, {"short": group}, (16, 32))
    assert axes.get_legend_handles_labels()[1] == ["short"]
    (line,) = axes.containers[0].lines[:1]
    assert line.get_xydata().tolist() == [[16, 1.5]]
    ticks = axes.xaxis.get_majorticklocs().tolist(), axes.xaxis.get_minorticklocs().tolist()
    assert ticks == ([16, 32], [])  # a log axis writes its minor ticks between them
