"""One budget over different matrices, and the table and figure of made-up rows."""

import jax
import pytest

from experiments import lora_rank, lora_targets
from experiments.lora_targets import BASE, SWEEP, TARGETS, rank_for
from experiments.shared import sarcasm
from research.models import decoder
from research.models.families.llama import llama
from research.paths import RuleError
from research.runs import override, results
from research.runs.canonical import run_id, to_json
from research.runs.environment import ROOT
from research.weights import lora
from research.weights.base import is_weight

# The sizes of SmolLM2-135M, whose vocabulary does not matter here.
SMOLLM2 = llama(64, 30, 576, 9, 3, 1536, tied=True)
RANKS = {"Wq": 27, "Wk": 40, "Wv": 40, "Wo": 27, "Wq, Wv": 16, "Wq, Wk, Wv, Wo": 8}
RANKS |= {"feed-forward": 5, "all of a block": 3}


@pytest.fixture(scope="module")
def shapes():
    model = decoder.Decoder(SMOLLM2)
    return jax.eval_shape(lambda: decoder.init(model, jax.random.key(0)))


@pytest.mark.parametrize("name", TARGETS)
def test_every_choice_has_about_the_budget(shapes, name):
    rank = rank_for(shapes, TARGETS[name], BASE.budget)
    assert rank == RANKS[name]
    tuned = jax.eval_shape(lambda p: lora.add(p, TARGETS[name], jax.random.key(0), rank), shapes)
    loras = [w for w in jax.tree.leaves(tuned, is_leaf=is_weight) if isinstance(w, lora.LoRA)]
    trained = sum(w.a.size + w.b.size for w in loras)
    assert abs(trained / BASE.budget - 1) < 0.04
    assert len(loras) == {"feed-forward": 3, "all of a block": 7}.get(name, name.count("W"))


def test_the_rank_is_at_least_one_and_the_rule_must_match(shapes):
    assert rank_for(shapes, TARGETS["feed-forward"], 10) == 1
    with pytest.raises(RuleError):
        rank_for(shapes, r".*/query/kernel", 10)


def made_up():
    rows = []
    for number, overrides in enumerate([*SWEEP, {**SWEEP[0], "seed": 1}, {"steps": 5}]):
        config = override(BASE, overrides)
        metrics = {"accuracy": 0.6 + 0.01 * number, "rank": 8, "trainable_parameters": 921_600}
        row = {"id": run_id("made_up", config), "config": to_json(config), "metrics": metrics}
        rows.append(row | {"overrides": to_json(overrides)})
    return rows


def test_table_and_figure():
    rows = made_up()
    lines = lora_targets.table(rows).splitlines()
    assert lines[2] == "| Wq | 8 | 921,600 | 0.64 ± 0.0566 |"  # 0.60 and 0.68
    assert lines[3] == "| Wk | 8 | 921,600 | 0.61 |"
    assert len(lines) == 2 + len(TARGETS) + 2 and lines[-1].endswith("over 1 seed.")
    axes = lora_targets.figure(rows).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()][6] == "feed-forward\nr = 8"
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(
        [0.64, *(0.6 + 0.01 * n for n in range(1, 8))]
    )


def test_runs_that_are_committed_are_still_those_of_lora_rank():
    rows = results.read(ROOT / "experiments/results/lora_rank.jsonl")
    ids = {run_id("lora_rank", override(lora_rank.BASE, point)) for point in lora_rank.SWEEP}
    assert {row["id"] for row in rows} == ids and len(ids) == 16


class Letters:
    """A token a letter, and one for each of the two label words."""

    def encode(self, text):
        labels = {word: [n] for n, word in enumerate(sarcasm.LABELS, start=1)}
        return labels.get(text) or [3 + ord(letter) % 90 for letter in text]


@pytest.mark.data
def test_only_the_label_after_the_question_is_supervised():
    data = sarcasm.read(Letters(), train=80, test=60, length=300)
    assert data.labels == [1, 2]
    for table, count in ((data.train, 80), (data.test, 60)):
        asked = table["weights"] != 0
        assert asked.sum() == count == table["segment_ids"].max(-1).sum()
        assert set(table["targets"][asked]) == {1, 2}
        assert set(table["tokens"][asked]) == {3 + ord(":") % 90}  # the question's last letter
    assert not {row.tobytes() for row in data.train["tokens"]} & {
        row.tobytes() for row in data.test["tokens"]
    }
