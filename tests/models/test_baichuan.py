"""Baichuan's presets, what tells its sizes apart, ALiBi's slopes, NormHead, and cached decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decode import Sampling, generate
from research.models import decoder
from research.models.families import ConfigError, baichuan, glm, read
from research.models.layers import NormHead
from research.models.position import Alibi, Rope, alibi_slopes

PUBLISHED = {
    "baichuan-7b": 7_000_559_616,
    "baichuan-13b": 13_264_901_120,
    "baichuan2-7b": 7_505_973_248,
    "baichuan2-13b": 13_896_668_160,
}


@pytest.mark.parametrize("name", baichuan.PRESETS)
def test_parameter_counts_are_the_published_ones(name):
    preset = baichuan.PRESETS[name]
    assert decoder.count_parameters(decoder.Decoder(preset)) == PUBLISHED[name]
    described = baichuan.to_huggingface(preset)
    assert read(described)[1] == preset
    assert described["architectures"] == [
        "BaiChuanForCausalLM" if name == "baichuan-7b" else "BaichuanForCausalLM"
    ]


def test_slopes_of_forty_heads():
    slopes = alibi_slopes(40)
    first = [0.8409, 0.7071, 0.5946, 0.5]
    last = [0.9170, 0.7711, 0.6484, 0.5453, 0.4585, 0.3856, 0.3242, 0.2726]
    np.testing.assert_allclose(slopes[:4], first, atol=5e-5)
    np.testing.assert_allclose(slopes[32:], last, atol=5e-5)
    np.testing.assert_allclose(slopes[:32], 2.0 ** (-np.arange(1, 33) / 4))
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    assert len(alibi_slopes(1)) == 1 and len(alibi_slopes(3)) == 3


SEVEN, THIRTEEN = (baichuan.to_huggingface(baichuan.PRESETS[f"baichuan-{n}b"]) for n in (7, 13))


def test_fields_tell_the_sizes_apart():
    again = dict(THIRTEEN, hidden_size=48, num_attention_heads=6)
    assert baichuan.from_huggingface(again).position == Alibi()
    again |= {"max_position_embeddings": 512}
    assert baichuan.from_huggingface(again).position == Rope()
    assert isinstance(baichuan.from_huggingface(dict(again, z_loss_weight=0.0)).head, NormHead)
    assert isinstance(baichuan.from_huggingface(dict(again, vocab_size=125_696)).head, NormHead)


@pytest.mark.parametrize(
    "config, message",
    [
        (THIRTEEN | {"max_position_embeddings": 4096}, "hidden_size = 5120 .* has max_position"),
        ({n: v for n, v in SEVEN.items() if n[:3] != "max"}, "hidden_size = 4096 .* lacks max_po"),
        (
            {n: v for n, v in SEVEN.items() if n[:3] != "max"} | {"hidden_size": 48},
            "BaiChuanForCausalLM.* lacks max_position_embeddings",
        ),
        ({n: v for n, v in THIRTEEN.items() if n[:5] != "model"}, "lacks the field 'model_max"),
        (SEVEN | {"quantization_config": {"bits": 4}}, "quantization_config"),
        (SEVEN | {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ],
)
def test_what_would_change_the_result_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        baichuan.from_huggingface(config)


@pytest.mark.parametrize(
    "config",
    [
        baichuan.baichuan(50, 2, 24, 6, 32, position=Alibi(), max_length=128),
        baichuan.baichuan(50, 2, 24, 6, 32, norm_head=True, max_length=128),
        glm.glm(50, 2, 24, 6, 2, 32, head_size=8, max_length=128),
    ],
    ids=["alibi", "rope, norm_head", "glm"],
)
def test_decoding_from_a_cache_is_the_full_forward(config):
    model = decoder.Decoder(config)
    params = jax.jit(decoder.init, static_argnums=0)(model, jax.random.key(1))
    params = jax.tree.map(lambda x: 8 * x, params)
    prompts = [[5, 9, 2], [7], [*range(2, 42)]]
    sampling = Sampling(temperature=0, max_tokens=6)
    out = generate(model, params, prompts, jax.random.key(0), sampling)
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    for prompt, answer, log_probs in zip(prompts, out.rows(), out.log_probs, strict=True):
        whole = np.zeros((1, 64), np.int32)
        whole[0, : len(prompt) + 6] = prompt + answer
        logits = apply(whole)[0, len(prompt) - 1 : len(prompt) + 5]
        assert answer == logits.argmax(-1).tolist()
        np.testing.assert_allclose(log_probs, jax.nn.log_softmax(logits).max(-1), atol=1e-4)


def test_norm_head_trains_and_does_not_see_the_length_of_a_row(key):
    x, head = jax.random.normal(key, (3, 6)), NormHead(5)
    w = jax.random.normal(jax.random.key(1), (6, 5))

    def apply(w):
        return head.apply({"params": {"kernel": w}}, x)

    want = x @ (w / np.linalg.norm(w, axis=0))
    np.testing.assert_allclose(apply(w), want, atol=1e-5)
    np.testing.assert_allclose(apply(w * jnp.arange(1, 6)), want, atol=1e-5)
    along = jax.grad(lambda scale: (apply(w * scale) ** 2).sum())(jnp.ones(5))
    np.testing.assert_allclose(along, 0, atol=1e-4)
    gradient = jax.grad(lambda w: (apply(w) ** 2).sum())(w.at[:, 2].set(0))
    assert np.isfinite(gradient).all() and np.abs(gradient[:, 0]).max() > 1e-2
