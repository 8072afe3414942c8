"""The two families of family_finetune: of one size, and each what its papers say."""

import dataclasses

import pytest
from matplotlib.figure import Figure

from experiments import family_finetune
from experiments.family_finetune import BASE, SMOKE, baichuan2, chatglm2
from research.models.decoder import Decoder, count_parameters
from research.models.layers import NormHead
from research.runs import override
from research.runs.canonical import run_id, to_json


@pytest.mark.parametrize("config", [BASE, override(BASE, SMOKE)], ids=["base", "smoke"])
def test_the_families_have_one_size(config):
    sizes = [count_parameters(Decoder(family(config))) for family in (chatglm2, baichuan2)]
    assert max(sizes) < 1.01 * min(sizes)


def test_the_base_has_the_size_that_is_said():
    assert 1_500_000 < count_parameters(Decoder(baichuan2(BASE))) < 1_650_000


def test_each_family_has_its_parts():
    glm, baichuan = chatglm2(BASE), baichuan2(BASE)
    blocks = [model.stacks[0].pattern[0] for model in (glm, baichuan)]
    assert [block.attention.kv_heads for block in blocks] == [2, 8]
    assert [block.attention.bias for block in blocks] == [True, False]
    assert [model.position.fraction for model in (glm, baichuan)] == [0.5, 1.0]
    assert isinstance(baichuan.head, NormHead) and not isinstance(glm.head, NormHead)
    assert blocks[0].ffn.features > blocks[1].ffn.features == BASE.ffn


def test_every_family_of_the_sweep_has_a_layout_and_a_loss():
    for overrides in family_finetune.SWEEP:
        config = dataclasses.replace(BASE, **overrides)
        assert config.family.__name__ in family_finetune.PARTS


def row(number, overrides):
    config = override(BASE, overrides)
    measures = [
        f"{at}/{of}_{unit}"
        for at in family_finetune.TIMES
        for of in ("answers", "text")
        for unit in ("nll", "bits_per_byte")
    ]
    measures += ["parameters", "pretrain_tokens_per_s", "tokens_per_s"]
    metrics = dict.fromkeys(measures, 1.0 + number) | {"after/answers_nll": 0.5 + number}
    named = {"id": run_id("made_up", config), "config": to_json(config)}
    return named | {"overrides": to_json(overrides), "metrics": metrics}


def test_the_table_has_a_line_a_family_with_both_sides_of_fine_tuning():
    rows = [row(*each) for each in enumerate(family_finetune.SWEEP)]
    table = family_finetune.table([*rows, row(9, {"family": chatglm2, "lr": 1.0})])
    lines = [line for line in table.splitlines() if line.startswith(("| ChatGLM2", "| Baichuan 2"))]
    assert len(lines) == 2 == len(rows) // 2
    assert "| 1.5 ± 0.707 → 1 ± 0.707 |" in lines[0]  # seeds 0 and 1 of 1 + n, then of 0.5 + n
    assert "| 3.5 ± 0.707 → 3 ± 0.707 |" in lines[1]
    assert isinstance(family_finetune.figure(rows), Figure)
