"""What is changed from the baseline, what is not, and what the table makes of it."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import training_recipe
from experiments.shared import small_lm
from experiments.training_recipe import BASE, FACTORS, SWEEP, model_of
from research.models import decoder
from research.runs import override
from research.runs.canonical import run_id, to_json

SMALL = {"layers": 2, "width": 64, "heads": 2}


def row(overrides, metrics):
    config = override(BASE, overrides)
    found = {"id": run_id("recipe", config), "config": to_json(config), "metrics": metrics}
    return found | {"overrides": to_json(overrides)}


def metrics(nll):
    return {"nll/128": nll, "diverged": 0.0, "log_partition": 7.0, "largest_logit": 5.0}


def test_one_field_at_a_time():
    assert SWEEP[:2] == [{"seed": 0}, {"seed": 1}]
    changed = [[name for name in point if name != "seed"] for point in SWEEP[2:]]
    assert all(len(names) == 1 for names in changed)
    for name, labels in FACTORS.items():
        first = next(iter(labels.values()))
        assert override(BASE, {name: first}) == BASE, name
        assert changed.count([name]) == 2 * (len(labels) - 1)


def deviations(label):
    """Of every leaf that begins at random, in a model of 2 layers."""
    config = override(BASE, {"init": FACTORS["init"][label], **SMALL})
    params = jax.jit(decoder.init, static_argnums=0)(
        decoder.Decoder(model_of(config)), jax.random.key(0)
    )
    block = params["stack_0"]["block_0"]
    return {
        "tables": np.std(params["embed"]["table"]),
        "in": np.std(block["ffn"]["up"]["kernel"]),
        "square": np.std(block["attention"]["q"]["kernel"]),
        "residual": np.std(block["ffn"]["down"]["kernel"]),
        "out": np.std(block["attention"]["o"]["kernel"]),
    }


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("std 0.02", [0.02] * 5),
        ("residual / sqrt(2L)", [0.02, 0.02, 0.02, 0.01, 0.01]),  # sqrt(4) = 2
        ("Xavier", [0.02, 320**-0.5 * 2**0.5, 0.125, 320**-0.5 * 2**0.5, 0.125]),
        ("std 0.2", [0.2] * 5),
    ],
)
def test_initialisations_by_hand(label, expected):
    """Xavier: sqrt(2 / (in + out)) of 64 x 64 and 64 x 256."""
    assert list(deviations(label).values()) == pytest.approx(expected, rel=0.05)


def test_schedules_share_peak_and_warmup():
    recipe = BASE.recipe
    rates = {
        label: np.array([float(made(recipe)(np.int32(t))) for t in range(recipe.steps)])
        for label, made in FACTORS["schedule"].items()
    }
    start = recipe.lr * np.arange(1, 13) / 12
    for label, found in rates.items():
        assert found.max() == pytest.approx(recipe.lr), label
        if label != "cosine, no warmup":
            np.testing.assert_allclose(found[:12], start, rtol=1e-5)
    assert rates["cosine, no warmup"][0] == pytest.approx(recipe.lr)
    ends = {label: found[-1] / recipe.lr for label, found in rates.items()}
    wanted = {"constant": 1.0, "inverse square root": 0.1**0.5}
    for label, end in ends.items():  # one step before a tenth, the last of WSD's twelve is steep
        assert end == pytest.approx(wanted.get(label, 0.1), rel=0.01, abs=0.08), label
    assert rates["warmup, stable, decay"][107] == pytest.approx(recipe.lr)


def test_changes_are_between_runs_of_one_seed():
    rows = [row({"seed": s}, metrics(nll)) for s, nll in [(0, 5.0), (1, 6.0)]]
    rows += [row({"dropout": 0.1, "seed": s}, metrics(nll)) for s, nll in [(1, 6.3), (0, 5.1)]]
    rows += [row({"loss.z_loss": 1e-2, "seed": 1}, metrics(5.5))]
    lines = training_recipe.table(rows).splitlines()
    assert lines[2].startswith("| baseline | 5.5 ± 0.707 | – | 0 of 2 |")
    assert lines[3].startswith("| dropout 0.1 | 5.7 ± 0.849 | +0.2000 ± 0.1414 | 0 of 2 |")
    assert lines[4].startswith("| z-loss 1e-2 | 5.5 | -0.5000 | 0 of 1 |")


def test_a_run_that_diverged_is_counted_and_has_no_loss(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_RESEARCH_CACHE", str(tmp_path / "cache"))
    recipe = dataclasses.replace(small_lm.SMOKE, texts=text, lr=1e30, steps=4)
    config = override(BASE, {"layers": 1, "width": 16, "heads": 2, "recipe": recipe})
    assert training_recipe.run(config, tmp_path / "run") == {"diverged": 1.0}
    rows = [row({"seed": 0}, metrics(5.0)), row({"dropout": 0.1, "seed": 0}, {"diverged": 1.0})]
    assert "| dropout 0.1 | – | – | 1 of 1 | – | – |" in training_recipe.table(rows)
    assert training_recipe.figure(rows).axes[0].get_yticklabels()[0].get_text() == "dropout 0.1"


def text() -> list[str]:
    return ["the moon and the stars and the sun in the sky\n" * 60]


def test_a_loss_of_the_uniform_guess_is_divergence(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_RESEARCH_CACHE", str(tmp_path / "cache"))
    overrides = {"layers": 1, "width": 16, "heads": 2, "init": FACTORS["init"]["std 0.2"]}
    found = {}
    for lr in (0.0, 3e-2):
        recipe = dataclasses.replace(small_lm.SMOKE, texts=text, lr=lr, steps=20)
        recipe = dataclasses.replace(recipe, eval_lengths=(16,))
        config = override(BASE, {**overrides, "recipe": recipe})
        found[lr] = training_recipe.run(config, tmp_path / str(lr))
    assert (found[0.0]["diverged"], found[3e-2]["diverged"]) == (1.0, 0.0)
    assert found[0.0]["nll/16"] > np.log(300) > found[3e-2]["nll/16"]
