"""What was compiled once is kept, gives the same bits, and can be turned off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from research import compiled
from research.models import decoder
from research.models.families.llama import llama
from research.objectives import next_token
from research.train.optim import AdamW, optimizer
from research.train.partition import partition
from research.train.state import initial_state, training_rng
from research.train.step import make_step

HITS = "/jax/compilation_cache/cache_hits"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A cache of this test's own, and nothing compiled before or after it."""
    chosen = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(compiled, "directory", lambda: tmp_path / "compiled")
    compilation_cache.reset_cache()
    yield tmp_path / "compiled"
    jax.config.update("jax_compilation_cache_dir", chosen)
    compilation_cache.reset_cache()


def trained(steps=2):
    """Every number of a small decoder's training, from the first parameters to the last moments."""
    model = decoder.Decoder(llama(32, 2, 16, 2, 2, 32, max_length=16))
    params = decoder.init(model, jax.random.key(0))
    trainable, frozen = partition(params, r".*")
    adamw = optimizer(AdamW(lr=1e-2), trainable)
    step = make_step(next_token(model), adamw)
    state = initial_state(trainable, adamw, training_rng(0))
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    batch = {"tokens": tokens, "targets": tokens, "weights": jnp.full((2, 16), 1 / 32)}
    for _ in range(steps):
        state, _ = step(state, frozen, None, batch)
    return jax.device_get((state.trainable, state.opt_state))


def test_a_second_process_finds_what_the_first_compiled_and_gets_the_same_bits(place):
    assert compiled.keep_compiled() == place
    jax.clear_caches()
    first, hits = trained(), []
    assert any(place.iterdir())
    jax.clear_caches()  # as a new process begins
    listen = lambda event, **more: hits.append(event == HITS)  # noqa: E731
    jax.monitoring.register_event_listener(listen)
    second = trained()
    jax.monitoring.unregister_event_listener(listen)
    assert any(hits)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_jaxs_variable_turns_it_off(place):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert compiled.keep_compiled() is None
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_a_place_that_was_chosen_stays(place, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert compiled.keep_compiled() == tmp_path / "mine"


def test_kinds_have_folders_of_their_own_for_this_processor():
    ours, tests = compiled.directory(), compiled.directory("compiled-tests")
    assert ours.name == tests.name
    assert ours.parent.name == "compiled" and tests.parent.name == "compiled-tests"
