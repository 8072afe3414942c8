"""RoPE's scalings as config.json names them, against what `transformers` computes.

The table is the output of scripts/references/rope_scalings.py (transformers 5.23.0, float32): yarn
truncates its band to whole frequencies, and its attention factor multiplies cos and sin.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from research.models.families.llama import rope_from, rope_parameters

LENGTH = 4096
TABLE = {
    "linear": (
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        8,
        [0.25, 0.025, 0.0024999999, 0.00025000001],
        1.0,
    ),
    "llama3.1": (
        {
            "rope_type": "llama3",
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "rope_theta": 500000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
        },
        32,
        [
            1.0,
            0.44036663,
            0.19392276,
            0.085397102,
            0.037606031,
            0.016560441,
            0.0072926651,
            0.0032114461,
            0.00052484602,
            7.7846555e-05,
            3.4281024e-05,
            1.5096218e-05,
            6.6478697e-06,
            2.9274997e-06,
            1.2891732e-06,
            5.6770881e-07,
        ],
        1.0,
    ),
    "llama3 without original length": (
        {
            "rope_type": "llama3",
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "rope_theta": 10000.0,
            "factor": 32.0,
        },
        16,
        [
            1.0,
            0.31622776,
            0.1,
            0.031622779,
            0.0099999998,
            0.0011827585,
            3.1250001e-05,
            9.8821183e-06,
        ],
        1.0,
    ),
    "yarn": (
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
        },
        32,
        [
            1.0,
            0.56234133,
            0.31622776,
            0.17782794,
            0.1,
            0.050209042,
            0.02484647,
            0.012066896,
            0.0057142857,
            0.0026108704,
            0.001129385,
            0.00044456986,
            0.00025000001,
            0.00014058533,
            7.9056947e-05,
            4.4456985e-05,
        ],
        1.138629436111989,
    ),
    "yarn, other turns and a given attention factor": (
        {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 40.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 0.7,
        },
        32,
        [
            1.0,
            0.42169651,
            0.13448237,
            0.038432077,
            0.0084986221,
            0.00033338039,
            0.00014058533,
            5.9284346e-05,
            2.4999999e-05,
            1.0542412e-05,
            4.4456983e-06,
            1.8747355e-06,
            7.905694e-07,
            3.3338034e-07,
            1.4058533e-07,
            5.9284343e-08,
        ],
        0.7,
    ),
    "yarn without original length": (
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 1.5},
        16,
        [
            1.0,
            0.31622776,
            0.1,
            0.028987546,
            0.0083333328,
            0.0023717084,
            0.00066666666,
            0.00021081851,
        ],
        1.0405465108108165,
    ),
    "yarn, one index only": (
        {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 1.5,
            "beta_slow": 1.5,
        },
        8,
        [1.0, 0.31622776, 0.0125, 0.0039528473],
        1.2079441541679836,
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_frequencies_and_attention_factor(name):
    given, size, frequencies, factor = TABLE[name]
    rope = rope_from({"rope_parameters": given, "max_position_embeddings": LENGTH})
    np.testing.assert_allclose(rope.frequencies(size), frequencies, rtol=1e-6)
    assert rope.scaling.amplitude == pytest.approx(factor, rel=1e-9)
    cos, sin = rope.tables(jnp.array([[0, 1, 70]]), size)
    angles = np.array([0, 1, 70])[:, None] * np.array(frequencies)
    np.testing.assert_allclose(cos[0, :, 0], factor * np.cos(angles), atol=2e-5)
    np.testing.assert_allclose(sin[0, :, 0], factor * np.sin(angles), atol=2e-5)


@pytest.mark.parametrize("name", TABLE)
def test_what_is_saved_means_the_same(name):
    given, size, *_ = TABLE[name]
    rope = rope_from({"rope_parameters": given, "max_position_embeddings": LENGTH})
    again = rope_from({"rope_parameters": rope_parameters(rope), "max_position_embeddings": 1})
    np.testing.assert_array_equal(again.frequencies(size), rope.frequencies(size))
    assert again.scaling.amplitude == rope.scaling.amplitude
