"""RoPE's scalings as config.json names them, against what `transformers` computes.

The table is what scripts/references/rope_scalings.py writes (transformers 5.23.0, float32): yarn
truncates its band to whole frequencies, and its attention factor multiplies cos and sin.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from research.models.families.llama import rope_from, rope_parameters

LENGTH = 4096
FIXTURE = Path(__file__).parent / "fixtures/rope_scalings.json"
TABLE = json.loads(FIXTURE.read_text())


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
