"""The command on a tiny model, and its page in a browser that is clicked and pointed at."""

import base64

import jax
import numpy as np
import pytest
import tokenizers
from chromium import needs_browser, tab
from tokenizers import decoders, models, pre_tokenizers

from research import hub
from research.evaluate import attention
from research.models import decoder
from research.models.families.llama import llama, to_huggingface
from research.tokenize.tokenizer import Tokenizer
from scripts import attention_map

TEXT = "ab伏a</script>\nab"


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """A model of 3 layers of 4 heads that reads bytes, with attention far from even."""
    backend = tokenizers.Tokenizer(
        models.BPE({b: n for n, b in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    config = llama(256, 3, 16, 4, 2, 16, head_size=8, init_std=0.6, max_length=40)
    model = decoder.Decoder(config)
    params = jax.jit(decoder.init, static_argnums=0)(model, jax.random.key(2))
    params = jax.tree.map(lambda w: w * 20 if w.ndim == 3 else w, params)
    path = tmp_path_factory.mktemp("model") / "tiny"
    hub.save(path, hub.Pretrained(model, params, Tokenizer(backend), to_huggingface(config)))
    return path


@pytest.fixture(scope="module")
def page(model_directory, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "attention.html"
    given = ["--model", str(model_directory), "--text", TEXT, "--out", str(path)]
    assert attention_map.main(given) == 0
    return path


@pytest.fixture(scope="module")
def weights(model_directory):
    loaded = hub.load(model_directory)
    ids = np.array(loaded.tokenizer.encode(TEXT))
    return np.asarray(attention.capture(loaded.model, loaded.params, ids)[0])


@pytest.mark.parametrize(
    "more, words",
    [
        (["--text", "a" * 9, "--max-tokens", "8"], "has 9 tokens, more than 8: shorten it or"),
        (["--text", "a" * 41], "has 41 tokens, the model reads at most 40"),
        (["--text", "a"], "has 1 tokens; two or more"),
    ],
)
def test_texts_that_cannot_be_shown_are_refused(model_directory, tmp_path, capsys, more, words):
    out = tmp_path / "x.html"
    assert attention_map.main(["--model", str(model_directory), "--out", str(out), *more]) == 1
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_a_wrong_name_or_model_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        attention_map.main(["--text", "ab", "--out", "page.htm"])
    assert "must end in .html, not 'page.htm'" in capsys.readouterr().err
    assert attention_map.main(["--text", "ab", "--model", "/nowhere/model"]) == 1
    assert "/nowhere/model" in capsys.readouterr().err


def test_the_picture_of_all_heads(page, weights):
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    figure = attention_map.draw(weights, "tiny")
    sheet = np.asarray(figure.axes[0].images[0].get_array().filled(np.nan))
    T = weights.shape[-1]
    first, last = sheet[:T, :T], sheet[-T - 1 : -1, -T - 1 : -1]
    for found, wanted in ((first, weights[0, 0]), (last, weights[-1, -1])):
        np.testing.assert_array_equal(found[np.tri(T, dtype=bool)], wanted[np.tri(T, dtype=bool)])
        assert np.isnan(found[~np.tri(T, dtype=bool)]).all()


def shown(page):
    """What each token's chip says: its weight, None where it cannot be seen."""
    return page.evaluate(
        "[...document.querySelectorAll('.token')].map(t => t.dataset.weight ?? null)"
        ".map(w => w === null ? null : +w)"
    )


def check(page, row, token):
    """The chips show the row of this token."""
    found = shown(page)
    assert found[token + 1 :] == [None] * (len(row) - token - 1)
    np.testing.assert_allclose(np.array(found[: token + 1], float), row[: token + 1], atol=1e-3)


@needs_browser
def test_the_page_shows_the_weights_of_the_head_clicked_and_the_token_pointed_at(
    page, weights, tmp_path
):
    T = weights.shape[-1]
    with tab(tmp_path) as browser:
        browser.open(page)
        check(browser, weights[0, 0, T - 1], T - 1)
        browser.point('[data-layer="1"][data-column="2"]', click=True)
        browser.point("#tokens li:nth-child(8) .token")
        check(browser, weights[1, 2, 7], 7)
        number = browser.evaluate("document.querySelector('.token small').textContent")
        assert abs(float(number.replace("<", "")) / 100 - weights[1, 2, 7, 0]) < 1e-3
        most = int(weights[1, 2, 7].argmax())
        assert f"({most}) {100 * weights[1, 2, 7, most]:.1f} %" in browser.evaluate(
            "document.getElementById('said').textContent"
        )
        # The mean of the heads and the rollout stand behind them.
        browser.point('[data-layer="2"][data-column="4"]', click=True)
        browser.point("#tokens li:nth-child(10) .token", click=True)
        check(browser, weights[2].mean(0)[9], 9)
        browser.press("ArrowRight")
        check(browser, weights[2].mean(0)[10], 10)
        browser.evaluate("document.querySelector('.map[tabindex=\"0\"]').focus()")
        browser.press("ArrowRight")
        check(browser, np.asarray(attention.rollout(weights))[2, 10], 10)
        for key in ("ArrowLeft", "ArrowLeft", "ArrowUp"):
            browser.press(key)
        check(browser, weights[1, 3, 10], 10)
        # Pointing at the map: the cell in row 6, column 2.
        browser.evaluate("document.getElementById('map').scrollIntoView({block: 'center'})")
        x, y = browser.evaluate(
            "(() => { const b = map.getBoundingClientRect();"
            "return [b.x + left + 2.5 * cell, b.y + 6.5 * cell]; })()"
        )
        browser.point_at(x, y)
        check(browser, weights[1, 3, 6], 6)
        assert "(6) gives" in browser.evaluate("document.getElementById('cell').textContent")
        assert (browser.errors, set(browser.requests)) == ([], {page.as_uri()})


@needs_browser
def test_tokens_scales_and_table_in_the_browser(page, weights, tmp_path):
    with tab(tmp_path) as browser:
        browser.open(page, width=390, height=844)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        words = browser.evaluate(
            "[...document.querySelectorAll('.token > span')].map(t => t.textContent)"
        )
        assert words[2:5] == ["伏 1/3", "伏 2/3", "伏 3/3"]
        assert "".join(words[6:15]) == "</script>" and words[15] == "⏎"
        # A weight w is shaded by w, or by 1 + log10(w) / 4.
        row = weights[0, 0, -1]
        shade = "parseFloat(document.querySelector('.token').style.background.split('accent) ')[1])"
        assert abs(browser.evaluate(shade) - 62 * row[0]) < 0.1
        browser.point("input[value=log]", click=True)
        assert abs(browser.evaluate(shade) - 62 * max(0, 1 + np.log10(row[0]) / 4)) < 0.1
        column = "[...document.querySelectorAll('#statistics tbody td:nth-child(3)')]"
        for clicks, way in ((1, -1), (2, 1)):
            browser.point("[data-column=entropy]", click=True)
            found = browser.evaluate(f"{column}.map(cell => +cell.textContent)")
            assert found == sorted(found, reverse=way < 0), clicks
        wanted = np.sort(np.asarray(attention.mean_entropy(weights)).ravel())
        np.testing.assert_allclose(found, wanted, atol=6e-4)
        light = base64.b64decode(browser.screenshot())
        browser.size(390, 844, dark=True)
        assert base64.b64decode(browser.screenshot()) != light
        assert (browser.errors, set(browser.requests)) == ([], {page.as_uri()})
