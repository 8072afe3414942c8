"""ChatGLM-6B against NumPy, its positions and its mask; presets of ChatGLM and GLM."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chatglm_numpy import GMASK, MASK, SOP, config, logits, positions, random_tensors
from safetensors.numpy import load_file, save_file

from research import hub
from research.decode import PromptError, Sampling, generate
from research.decode.beam import Beams, beam_search
from research.decode.speculative import speculate
from research.kernels.mask import Mask
from research.models import arrange, decoder
from research.models.block import DeepNorm, NormedResidual
from research.models.families import ConfigError, chatglm, glm, read
from research.models.prefix import PrefixRope2d

ROWS = [
    [5, 9, 2, GMASK, SOP, 7, 8, 22, 1],
    [5, MASK, 9, 4, SOP, 3, 12],  # text after the mask token
    [GMASK, SOP],
    [6, MASK, 2, GMASK, SOP, 11, 6],  # of two mask tokens, gMASK
    [*range(3, 28), *range(2, 27), GMASK, SOP, *range(2, 24)],  # long enough for tiles
]
PUBLISHED = {
    "chatglm-6b": 6_173_286_400,
    "chatglm2-6b": 6_243_584_000,
    "chatglm3-6b": 6_243_584_000,
    "glm-4-9b": 9_399_951_360,
    "glm-4-9b-chat": 9_399_951_360,
    "glm-130b": 128_697_794_560,  # derived
}


@pytest.fixture(scope="module")
def tensors():
    return random_tensors()


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatglm")
    (folder / "config.json").write_text(json.dumps(config()))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return hub.load(folder)


@pytest.fixture(scope="module")
def apply(loaded):
    return jax.jit(
        lambda *args, **more: loaded.model.apply({"params": loaded.params}, *args, **more)
    )


def padded(rows, left, right=0):
    """Rows [B, left + T + right] of the first `T` tokens, and segment ids; padded on both sides."""
    width = max(map(len, rows)) + left + right
    tokens, segments = np.full((2, len(rows), width), 3, np.int32)
    segments[:] = 0
    for n, row in enumerate(rows):
        stop = width - right
        tokens[n, stop - len(row) : stop], segments[n, stop - len(row) : stop] = row, 1
    return tokens, segments


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(len(row)))
def test_logits_equal_numpy(loaded, tensors, row):
    got, want = loaded.logits(row)[0], logits(tensors, row)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_padding_on_either_side_changes_nothing(apply, tensors):
    tokens, segments = padded(ROWS[:4], left=2, right=3)
    got = np.asarray(apply(tokens, segment_ids=segments))
    for n, row in enumerate(ROWS[:4]):
        np.testing.assert_allclose(got[n][segments[n] == 1], logits(tensors, row), atol=1e-5)
    assert np.isfinite(got).all()


def test_positions_and_prefix_by_hand():
    scheme = PrefixRope2d(start_id=SOP, mask_ids=(GMASK, MASK))
    tokens, segments = padded(ROWS[:2], left=1)
    at, mask, context = scheme.place(
        jnp.asarray(tokens),
        arrange.segment_positions(jnp.asarray(segments)),
        Mask(query_segments=jnp.asarray(segments), key_segments=jnp.asarray(segments)),
        None,
    )
    assert context is None
    first = [[0, 0, 1, 2, 3, 3, 3, 3, 3, 3], [0, 0, 0, 0, 1, 2, 3, 1, 1, 1]]
    second = [[0, 0, 0, 0, 0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0, 0, 1, 2, 3]]
    np.testing.assert_array_equal(at, np.stack([first, second], -1))
    assert mask.prefix.tolist() == [5, 7]


def test_given_positions_stand_for_those_read(apply, tensors):
    """Unpinned and causal, as no release is, to see that both are taken as they come."""
    row = ROWS[0]
    first, second, _ = positions(row)
    plain = (list(range(len(row))), second, 0)
    at = np.stack(plain[:2], -1)[None]
    got = apply(np.array([row]), jnp.asarray(at), mask=Mask())[0]
    np.testing.assert_allclose(got, logits(tensors, row, plain), atol=1e-5)
    assert np.abs(got - logits(tensors, row)).max() > 1e-2 and first != plain[0]


def test_the_context_is_a_set_of_tokens_and_positions(apply):
    """Permuted together within the context they say the same to what follows it; a causal
    model's answer would change."""
    row, order = np.array(ROWS[0]), np.array([2, 0, 3, 1, *range(4, 9)])
    first, second, start = positions(ROWS[0])
    at = np.stack([first, second], -1)
    mask = Mask(prefix=jnp.array([start]))
    want, got = (
        np.asarray(apply(row[o][None], jnp.asarray(at[o][None]), mask=mask)[0])
        for o in (np.arange(9), order)
    )
    np.testing.assert_allclose(got, want[order], atol=1e-5)
    causal = apply(row[order][None], jnp.asarray(at[order][None]), mask=Mask())[0]
    assert np.abs(causal[start:] - want[start:]).max() > 1e-2


def test_decoding_from_a_cache_is_the_full_forward(loaded, tensors):
    prompts = [row[: row.index(SOP) + 1] for row in ROWS]
    sampling = Sampling(temperature=0, max_tokens=6)
    out = generate(loaded.model, loaded.params, prompts, jax.random.key(0), sampling, pad_id=3)
    for prompt, answer, log_probs in zip(prompts, out.rows(), out.log_probs, strict=True):
        exact = logits(tensors, prompt + answer)[len(prompt) - 1 : -1]
        assert answer == exact.argmax(-1).tolist()
        exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
        np.testing.assert_allclose(log_probs, exact.max(-1), atol=1e-4)


def test_a_row_without_start_or_mask_is_refused_or_nan(loaded, apply):
    params = {"params": loaded.params}
    for row in ([5, 9, GMASK], [5, 9, SOP], [5, SOP, GMASK]):
        with pytest.raises(ValueError, match="row 0 is not one prompt with a mask token"):
            loaded.model.apply(params, jnp.array([row]))
        assert np.isnan(apply(jnp.array([row]))).all()
    with pytest.raises(ValueError, match=f"row 1 lacks the start token {SOP}"):
        loaded.logits([[5, GMASK, SOP], [5, 9, GMASK]])
    with pytest.raises(PromptError, match="prompt 1 has none of the mask tokens"):
        prompts = [[GMASK, SOP], [5, SOP, GMASK]]
        generate(loaded.model, loaded.params, prompts, jax.random.key(0), Sampling(max_tokens=4))
    two = jnp.array([[1, 1, 1, 2, 2, 2]])
    with pytest.raises(ValueError, match="row 0 is not one prompt"):
        loaded.model.apply(params, jnp.array([[4, GMASK, SOP] * 2]), segment_ids=two)


def test_no_way_of_decoding_reads_a_prompt_without_its_markers(loaded):
    given, few = (loaded.model, loaded.params), Sampling(temperature=0, max_tokens=2)
    with pytest.raises(PromptError, match=f"prompt 0 lacks the start token {SOP}"):
        beam_search(*given, [[5, 9, 2]], Beams(2, max_tokens=2))
    with pytest.raises(PromptError, match=f"prompt 0 lacks the start token {SOP}"):
        speculate(*given, [5, 9, 2], jax.random.key(0), few)


def test_fresh_parameters_need_no_prompt(loaded):
    fresh = decoder.init(loaded.model, jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, loaded.params)


def test_the_checkpoint_comes_back(folder, loaded, tensors, tmp_path):
    hub.save(tmp_path / "out", loaded)
    saved = load_file(tmp_path / "out/model.safetensors")
    kept = {n: a for n, a in tensors.items() if "inv_freq" not in n and n != "lm_head.weight"}
    assert saved.keys() == kept.keys()
    for name, array in kept.items():
        np.testing.assert_array_equal(saved[name], array, err_msg=name)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert {name: written.get(name) for name in config()} == config()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"position_encoding_2d": False}, "position_encoding_2d = False is not implemented"),
        ({"quantization_bit": 8}, "quantization_bit = 8 is not implemented, only 0 or None"),
        ({"pre_seq_len": 64}, "pre_seq_len = 64 is not implemented"),
        ({"inner_hidden_size": 4.5}, "inner_hidden_size = 4.5; expected a whole number"),
        ({"gmask_token_id": None}, None),
    ],
)
def test_what_would_change_the_result_is_refused(fields, message):
    given = config() | fields
    if message is None:
        del given["gmask_token_id"]
        message = "lacks the field 'gmask_token_id'"
    with pytest.raises(ConfigError, match=message):
        hub.pretrained.require_fields(given)
        chatglm.from_huggingface(given)


def test_neither_generation_is_named():
    with pytest.raises(ConfigError, match="this one has neither"):
        chatglm.from_huggingface({"model_type": "chatglm"})
    with pytest.raises(ConfigError, match="GLM-130B has none"):
        chatglm.to_huggingface(chatglm.PRESETS["glm-130b"])


def test_the_residual_is_deep_norm_counted_from_another_place(key):
    """norm1, f1, norm2, f2, norm3: from the first norm on DeepNorm's post-norms are the next ones."""
    x, *scales = jax.random.normal(key, (6, 3, 8))
    norm1, norm2, norm3 = (lambda y, s=s: s * (y - y.mean(-1, keepdims=True)) for s in scales[:3])
    f1, f2 = (lambda y, s=s: jnp.tanh(s * y) for s in scales[3:])
    ours, theirs = NormedResidual(1.7), DeepNorm(1.7)
    got = norm3(ours(norm2, f2, ours(norm1, f1, x)))
    want = theirs(norm3, f2, theirs(norm2, f1, norm1(x)))
    np.testing.assert_allclose(got, want, rtol=1e-6)


PRESETS = chatglm.PRESETS | glm.PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_the_published_ones(name):
    assert decoder.count_parameters(decoder.Decoder(PRESETS[name])) == PUBLISHED[name]
    if name != "glm-130b":
        family = glm if name in glm.PRESETS else chatglm
        described = family.to_huggingface(PRESETS[name])
        assert read(described)[1] == PRESETS[name]
