"""The command on tiny saved models and adapters: its files, its numbers and its refusals."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from research import hub
from research.evaluate import spectrum
from research.models import decoder
from research.models.families.llama import llama, to_huggingface
from research.weights import lora
from research.weights.base import is_weight
from scripts import spectrum as script

ATTENTION, FFN = r".*/attention/(q|v)/kernel", r".*/ffn/down/kernel"


def model(layers=3, width=16):
    config = llama(40, layers, width, 4, 2, 24, tied=True, init_std=0.3)
    net = decoder.Decoder(config)
    params = decoder.init(net, jax.random.key(0))
    return hub.Pretrained(net, params, None, to_huggingface(config))


def tuned(base, rule, seed, rank=2):
    key = jax.random.key(seed)

    def filled(w):
        return w.replace(b=jax.random.normal(key, w.b.shape)) if isinstance(w, lora.LoRA) else w

    params = lora.add(base.params, rule, key, rank=rank)
    return dataclasses.replace(base, params=jax.tree.map(filled, params, is_leaf=is_weight))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, two adapters, one of them merged, one on other matrices, and a deeper model."""
    path, base = tmp_path_factory.mktemp("models"), model()
    one = tuned(base, ATTENTION, 1)
    hub.save(path / "base", base)
    hub.save_adapter(path / "one", one)
    hub.save(path / "merged", one)
    hub.save_adapter(path / "two", tuned(base, ATTENTION, 2, rank=3))
    hub.save_adapter(path / "elsewhere", tuned(base, FFN, 3))
    hub.save(path / "deeper", model(layers=4))
    return path


def start(folder, out, *given, more=()):
    return script.main([*(str(folder / name) for name in given), "--out", str(out), *more])


def cells(text, path, layer):
    (line,) = [li for li in text.splitlines() if li.startswith(f"| {path} | {layer} |")]
    return [float(cell) for cell in line.strip("| ").split(" | ")[2:]]


Q = "stack_0/block_0/attention/q/kernel"


def test_an_adapter_and_the_merged_model_have_the_same_table(folder, tmp_path, capsys):
    assert start(folder, tmp_path / "a", "base", "one") == 0
    said = capsys.readouterr().out
    assert f"| {Q} | mean |" in said and f"| {Q} | 1 |" not in said
    assert start(folder, tmp_path / "m", "base", "merged", more=("--rank", "2")) == 0
    thin, thick = ((tmp_path / d / "spectrum.md").read_text() for d in "am")
    for layer in "012":
        a, m = cells(thin, Q, layer), cells(thick, Q, layer)
        np.testing.assert_allclose(a, m, rtol=0.02)
    base = hub.load(folder / "base")
    after = hub.load_adapter(base, folder / "one")
    one = spectrum.spectra(base.params, after.params, ATTENTION)[Q]
    assert a[2] == pytest.approx(float(one.values[2, 0]), rel=0.01)
    assert a[3] == pytest.approx(float(spectrum.effective_rank(one.values)[2]), rel=0.01)
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"values.png", "rank.png", "spectrum.md"}


def test_two_adapters_are_compared(folder, tmp_path):
    more = ("--format", "svg", "--side", "out")
    assert start(folder, tmp_path, "base", "one", "two", more=more) == 0
    names = {"values_1", "values_2", "rank_1", "rank_2", "similarity", "similarity_layers"}
    assert {p.stem for p in tmp_path.glob("*.svg")} == names
    text = (tmp_path / "spectrum.md").read_text().partition("## similarity")[2]
    (line,) = [li for li in text.splitlines() if li.startswith(f"| {Q} |")]
    rank, mean, least, most, *chance = map(float, line.strip("| ").split(" | ")[1:])
    assert rank == 2 and 0 <= least <= mean <= most < 1 and chance == [2 / 16, 2 / 16]


def test_an_update_is_wholly_like_itself(folder, tmp_path):
    base = hub.load(folder / "base")
    one, merged = (
        script.open_update(base, str(folder / name), r".*") for name in ("one", "merged")
    )
    for maps in script.similarities(one, merged, "in").values():
        np.testing.assert_allclose(maps[:, 1, 1], 1, atol=1e-3)
    phi = script.similarities(one, merged, "in")
    figure = script.draw_similarity(phi, ["one", "merged"], "")
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert shown[0, 0] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "given, words",
    [
        (("base", "deeper"), r"deeper does not belong to the base: .* before the update, .* after"),
        (("base", "base"), r"no matrix that '\.\*' matches differs from the base's"),
        (("base", "one", "elsewhere"), "share no matrix: one has stack_0/block_0/attention/q"),
        (("base", "nowhere"), "there is no such file or directory"),
    ],
)
def test_what_does_not_belong_together_is_named(folder, tmp_path, capsys, given, words):
    code = start(folder, tmp_path / "out", *given)
    said = capsys.readouterr().err
    assert code == 1 and re.search(words, said)
    assert not (tmp_path / "out").exists()


def test_a_layer_that_did_not_change_is_not_compared(folder):
    base = hub.load(folder / "deeper")
    found = script.open_update(base, str(folder / "one"), r".*")
    phi = script.similarities(found, found, "in")[Q]
    assert np.isnan(phi[3]).all() and np.isfinite(phi[:3]).all()
    rows = script.numbers(found[Q], spectrum.matrices(base.params)[Q], 2)
    assert rows.shape == (4, 7) and rows[3, 0] == rows[3, 6] == 0
